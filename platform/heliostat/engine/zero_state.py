"""Exposes ZeRO's shards as slices of flat tensors, which can be saved and resharded.

Whatever the stage, a rank's share of a parameter's fp32 master weight and of its moments (what the optimizer keeps of it) is a
slice [start, start + n) of the flattened parameter, or of the part of it that is left to this rank where workers divide it
(`division`). `FlatShard` says just that, so a checkpoint saved at one layout loads at any other. Names: `master.<parameter>` and,
as the optimizer's class in `heliostat.optim.optimizers` says,
`exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, ...; persistent buffers are `buffer.<name>`, and parameters that are not trained
`frozen.<parameter>`, in the precision that the engine holds them in.

The dynamic loss scale of fp16 is state, too: gradients are computed of the loss times a scale, which halves when they overflow
(that step is skipped, and counted) and doubles after a while without (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).
Begun again on resume, it would skip steps until it was found again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.layout import FROZEN
from heliostat.engine import patches, stream_patches
from heliostat.errors import ConfigError, TrainingError
from heliostat.parallel import division

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def state(engine: DeepSpeedEngine, whole: bool = False) -> dict[str, torch.Tensor]:
    """Returns this rank's slices of all training state, as views: loading into them changes the engine.

    What several ranks hold the same slice of, each saves a part of, and loads the `whole`. What all workers of a group that
    divides matrices hold, the first of them saves.
    """
    out: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key, local, start in _slices(engine, parameter):
                shard = division.placed(parameter, local.detach(), start)
                out[f"{key}.{name}"] = shard if whole else share(engine, parameter, shard)
    persistent = engine.module.state_dict().keys() if engine.zero_optimization_stage() < 3 else _persistent_buffers(engine.module)
    out |= {f"buffer.{name}": b for name, b in engine.module.named_buffers() if name in persistent}
    return out


def alike(engine: DeepSpeedEngine) -> tuple[int, int]:
    """Returns which of how many ranks this one is that hold the same slices: at stage 0 all, at stage 3 one of each group."""
    if engine.zero_optimization_stage() == 0:
        return _with_same_part(engine)
    return (engine.state_group.number, engine.state_group.count) if engine.state_group else (0, 1)


def saves_all(engine: DeepSpeedEngine) -> bool:
    """Tells whether each rank saves all that it holds."""
    return alike(engine)[1] == 1 and not _divides(engine)


def frozen(engine: DeepSpeedEngine, whole: bool = False) -> dict[str, FlatShard]:
    """Returns this rank's slices of the parameters that are not trained, as views.

    Below stage 3 every rank holds all of them: it saves the rank-th part, and loads the `whole`.
    """
    out: dict[str, FlatShard] = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            continue
        if engine.zero_optimization_stage() == 3:
            if p.ds_tensor.numel() < p.ds_tensor.ds_numel:
                raise ConfigError(f"train.zero.offload.param: nvme cannot hold {name!r}, which is not trained; use cpu")
            start, size = _at_stage_3(p)
            shard, number, count = division.placed(p, p.ds_tensor.data.view(-1)[:size], start), *alike(engine)
        else:
            if not p.is_contiguous():
                p.data = p.data.contiguous()
            shard, (number, count) = division.placed(p, p.data.view(-1), 0), _with_same_part(engine)
        out[f"{FROZEN}.{name}"] = shard if whole else _part(engine, p, shard, number, count)
    return out


def _persistent_buffers(module: torch.nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, m in module.named_modules()
        for name in m._buffers
        if name not in m._non_persistent_buffers_set
    }


class SlicePlace(NamedTuple):
    """Describes where the optimizer keeps this rank's slice of a parameter: `numel` elements from `offset` on of `flat`, a tensor
    that it steps. `start`: where the slice begins in this worker's part of the parameter."""

    flat: torch.Tensor
    offset: int
    numel: int
    start: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Views the slice's elements in `flat`, or in the state that the optimizer keeps of it."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def place(engine: DeepSpeedEngine, p: torch.nn.Parameter) -> SlicePlace | None:
    """Finds this rank's slice of a trained parameter; None if it has none.

    DeepSpeed's accessors are of no use here: where the optimizer's memory is on the host, they return copies on the GPU.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return SlicePlace(p, 0, p.numel(), 0)
    if stage == 3:
        group, offset, _ = zero.grad_position[zero.get_param_id(p)]
        start, size = _at_stage_3(p)
        return SlicePlace(_flats(engine)[group], offset, size, start)
    if (mapping := patches.fragment(p)) is None:
        return None
    kept, within = mapping.hp_fragment_address, mapping.lp_fragment_address
    return SlicePlace(_flats(engine)[mapping.param_group_index], kept.start, kept.numel, within.start)


def _slices(engine: DeepSpeedEngine, p: torch.nn.Parameter) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yields (key, local values, their start in this worker's part of the parameter) for the master weight and each moment;
    nothing if this rank has none of them."""
    if slice_ := place(engine, p):
        moments = inner_optimizer(engine).state[slice_.flat] if engine.moments[p] else {}
        for key, tensor in [("master", slice_.flat), *((k, moments[k]) for k in engine.moments[p])]:
            yield key, slice_.of(tensor), slice_.start


def _at_stage_3(p: Any) -> tuple[int, int]:
    """Returns where this rank's slice begins in this worker's part of a parameter, and how many elements it has: workers that
    divide experts each have a part, which is divided among those with the same."""
    per = p.ds_tensor.ds_numel
    start = min(dist.get_rank(p.ds_process_group) * per, p.ds_numel)
    return start, min(per, p.ds_numel - start)


def flat_groups(engine: DeepSpeedEngine) -> list[tuple[torch.Tensor, list[torch.nn.Parameter]]]:
    """Lists the fp32 tensors that the inner optimizer updates, with the parameters in each: parameters themselves at stage 0,
    flat partitions above."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [(p, [p]) for p in engine.module.parameters() if p.requires_grad]
    groups = zero.fp16_groups if stage == 3 else zero.bf16_groups if _sums_apart(engine) else zero.bit16_groups
    return [(flat, group) for flat, group in zip(_flats(engine), groups, strict=True) if flat is not None]


def _flats(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Lists DeepSpeed's flat fp32 tensors: one of each parameter group, or of each of its parts at stage 3."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return zero.fp32_partitioned_groups_flat
    return zero.fp32_groups_flat_partition if _sums_apart(engine) else zero.single_partition_of_fp32_groups


def _sums_apart(engine: DeepSpeedEngine) -> bool:
    """Tells whether the engine is at stage 1 in bf16 with gradients summed in fp32.

    DeepSpeed has an optimizer of its own for that, with other attribute names.
    """
    return hasattr(engine.optimizer, "bf16_groups")


def inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def init_optimizer_state(engine: DeepSpeedEngine) -> None:
    """Creates the optimizer state that is made lazily at the first step, so that there is something to load into; TrainingError
    if what is written into its slices doesn't arrive.

    New runs need it too: DeepSpeed links parameters to their moments after the first parameter group's first step, when the
    other groups have none.
    """
    optimizer = inner_optimizer(engine)
    states, fused = optimizer.state, optimizer.defaults.get("fused")
    for tensor, group in flat_groups(engine):
        if tensor not in states:
            states[tensor] = {"step": torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")}
            for k in engine.moments[group[0]]:
                states[tensor][k] = tensor.detach().clone() if k in engine.copies else torch.zeros_like(tensor)
    if engine.zero_optimization_stage() in (1, 2):
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat, group in flat_groups(engine):
            lazy_init_hp_params_optimizer_state(group, flat, states)
    _require_views(engine)


def _require_views(engine: DeepSpeedEngine) -> None:
    """Raises TrainingError unless DeepSpeed reads what is written into the slices of `state`.

    Restores and the average of the weights write there. If a slice were a copy, training would continue from other weights
    without an error. So this writes another number into both ends of each slice, looks for it where DeepSpeed keeps the
    parameter, and puts the values back.
    """
    ends = [
        (f"{key}.{name}", _ends(local), _ends(_kept(engine, p, key)[: local.numel()]))
        for name, p in engine.module.named_parameters()
        if p.requires_grad
        for key, local, _ in _slices(engine, p)
        if local.numel()
    ]
    before = [mine.clone() for _, mine, _ in ends]
    try:
        for number, (_, mine, _) in enumerate(ends, 1):
            mine.fill_(-number)
        lost = [name for name, mine, its in ends if mine.device != its.device or not torch.equal(mine, its)]
    finally:
        for (_, mine, _), values in zip(ends, before, strict=True):
            mine.copy_(values)
    if lost:
        raise TrainingError(
            f"train.zero: DeepSpeed keeps {len(lost)} tensors, {lost[0]!r} first, where a restore can't write them (stage "
            f"{engine.zero_optimization_stage()}). Install the version of DeepSpeed that heliostat requires"
        )


def _ends(values: torch.Tensor) -> torch.Tensor:
    """Views the first and the last element."""
    return values[:: max(1, values.numel() - 1)]


def _kept(engine: DeepSpeedEngine, p: torch.nn.Parameter, key: str) -> torch.Tensor:
    """Returns the tensor in which DeepSpeed itself keeps the master weight or a moment of a parameter, padded or not."""
    stage, kind = engine.zero_optimization_stage(), None if key == "master" else key
    if stage == 0:
        return (engine.optimizer.state[p][key] if kind else p.data).view(-1)
    if stage == 3:
        return patches.partition_state(engine.optimizer, p, kind)
    return patches.fragment(p).get_hp_fragment(kind)


def optimizer_steps(engine: DeepSpeedEngine) -> int:
    """Counts the steps that the optimizer has made (with fp16, overflowing steps are skipped)."""
    return engine.global_steps - engine.skipped_steps


def share(engine: DeepSpeedEngine, p: torch.nn.Parameter, shard: FlatShard) -> FlatShard:
    """Cuts the part of a trained parameter's slice that this rank saves, where others hold the same."""
    return _part(engine, p, shard, *alike(engine))


def _part(engine: DeepSpeedEngine, p: torch.nn.Parameter, shard: FlatShard, number: int, count: int) -> FlatShard:
    """Cuts a slice that so many ranks hold into a part for each; of what all workers of a group have whole, the first has it."""
    if _divides(engine) and division.of(p).parts == 1 and engine.mpu.get_tensor_model_parallel_rank() > 0:
        return shard.cut(0, 0)
    numel = shard.local.numel()
    per = -(-numel // count)
    return shard.cut(min(number * per, numel), min((number + 1) * per, numel))


def _divides(engine: DeepSpeedEngine) -> bool:
    """Tells whether workers divide matrices (`tensor_group`)."""
    return engine.autotp_size() > 1


def _with_same_part(engine: DeepSpeedEngine) -> tuple[int, int]:
    """Returns which of how many ranks this one is that have the same part of each matrix."""
    if _divides(engine):
        return engine.mpu.get_data_parallel_rank(), engine.mpu.get_data_parallel_world_size()
    return dist.get_rank(), dist.get_world_size()


def after_load(engine: DeepSpeedEngine, steps: int) -> None:
    """Completes the engine after its slices were loaded: sets the step count, and the weights that the forward pass uses."""
    engine.global_steps, engine.skipped_steps = steps, 0
    for values in inner_optimizer(engine).state.values():
        values["step"].fill_(float(steps))
    refresh(engine)


def refresh(engine: DeepSpeedEngine) -> None:
    """Copies the fp32 master weights into the weights that the forward pass uses."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        patches.partition_parameters(zero)
        for low, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            if low is not None:
                low.data.copy_(master.data)
        patches.reassign_parameters(zero, engine.module.parameters())
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        stream_patches.gathers_wait(zero)
    elif stage and _sums_apart(engine):
        zero.update_lp_params()
    elif stage:
        from deepspeed.runtime.utils import all_gather_dp_groups

        for i, parts in enumerate(zero.parallel_partitioned_bit16_groups):
            parts[dist.get_rank(zero.real_dp_process_group[i])].data.copy_(zero.single_partition_of_fp32_groups[i].data)
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )


# assembled, for comparisons of numbers: collective, and of this worker's part where workers divide a parameter (`division`) -----


def full_gradient(p: torch.nn.Parameter) -> torch.Tensor | None:
    """Assembles the gradient of the backward passes since the last step; None if the parameter has none."""
    from deepspeed.utils import safe_get_full_grad

    grad: torch.Tensor | None = safe_get_full_grad(p)
    return None if grad is None else grad.detach()


def full_state(engine: DeepSpeedEngine, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
    """Assembles the fp32 master weight, or the optimizer's state `key`."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not engine.zero_optimization_stage():
        tensor: torch.Tensor = p.data if key is None else engine.optimizer.state[p][key]
    else:
        tensor = safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)
    return tensor.detach()


def gathered(engine: DeepSpeedEngine, p: torch.nn.Parameter) -> AbstractContextManager[object]:
    """Opens the context in which a parameter holds the weight that the forward pass uses."""
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[object] = GatheredParameters([p], enabled=engine.zero_optimization_stage() == 3)
    return context


# the loss scale of fp16 ----------------------------------------------------------------------------------------------

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's dynamic loss scaler


def read_loss_scale(engine: DeepSpeedEngine) -> dict[str, float] | None:
    """Reads the state of the dynamic loss scale for a checkpoint; None where there is no loss scale, or it is fixed."""
    scaler = _scaler(engine)
    return {k: getattr(scaler, k) for k in FIELDS} if scaler else None


def write_loss_scale(engine: DeepSpeedEngine, values: dict[str, float] | None) -> str | None:
    """Restores the dynamic loss scale from a checkpoint; returns a notice if the engine needs one and there is none."""
    scaler = _scaler(engine)
    if scaler and not values:
        return f"the checkpoint holds no fp16 loss scale: it begins anew at {scaler.cur_scale:g}, and steps may be skipped"
    for key, value in (values or {}).items() if scaler else ():
        setattr(scaler, key, value)
    return None


def _scaler(engine: DeepSpeedEngine) -> Any:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
