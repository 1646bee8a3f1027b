"""Locates the state that DeepSpeed's ZeRO shards (`sharded_state`), with one class for each of DeepSpeed's optimizers.

Only this module, `patches`, and `stream_patches` use DeepSpeed's internals. `adapter` requires DeepSpeed 0.19.8 or a later patch
version, and an optimizer that has all attributes in `parts`. DeepSpeed's public accessors can't locate the slices: if the
optimizer's memory is on the host, these accessors return copies on the GPU.

The dynamic loss scale of fp16 is also state. Gradients are computed from the loss times a scale. When the gradients overflow, the
scale halves, and the step is skipped and counted. After a while without overflow, the scale doubles (Micikevicius et al. 2018,
arXiv 1710.03740, section 3.2). Without the old scale, a resumed run would skip steps until the run has found the scale again.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from heliostat.engine import patches, stream_patches
from heliostat.engine.sharded_state import Moments, Replica, ShardedState, SlicePlace

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # attributes of DeepSpeed's dynamic loss scaler


@patches.guard
def adapter(engine: DeepSpeedEngine, moments: Moments, copies: Collection[str], replica: Replica | None) -> ShardedState:
    """Makes the adapter of an engine that was just initialized.

    `replica`: the index of this worker's group, and the number of groups that each have all state (`StateGroup`). Raises
    ConfigError if this version of DeepSpeed keeps the state in other attributes.
    """
    shared = SummedApart if hasattr(engine.optimizer, "bf16_groups") else Partitioned
    kind: type[ZeroState] = (Replicated, shared, shared, Divided)[engine.zero_optimization_stage()]
    for name in kind.parts:
        getattr(engine.optimizer, name)
    return kind(engine, moments, copies, replica)


def shape(parameter: Any) -> tuple[int, ...]:
    """Returns the complete shape of a parameter, which ZeRO-3 may have flattened."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def part(parameter: Any) -> torch.Tensor:
    """Returns a view of this worker's part of a parameter. Until ZeRO-3 partitions the parameter, the part is the complete
    parameter."""
    return getattr(parameter, "ds_tensor", parameter).data


class ZeroState(ShardedState):
    """Implements the methods that are the same for all stages. `parts`: the attributes that the stage's optimizer must have."""

    parts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, engine: DeepSpeedEngine, moments: Moments, copies: Collection[str], replica: Replica | None) -> None:
        super().__init__(engine.module, moments, copies)
        self._engine, self._zero, self._stage = engine, engine.optimizer, engine.zero_optimization_stage()
        self.optimizer = engine.optimizer.optimizer if self._stage else engine.optimizer
        everyone, groups = (dist.get_rank(), dist.get_world_size()), replica or (0, 1)
        if engine.autotp_size() > 1:
            self.matrix_part = engine.mpu.get_tensor_model_parallel_rank(), engine.autotp_size()
            everyone = engine.mpu.get_data_parallel_rank(), engine.mpu.get_data_parallel_world_size()
        self.replicas = groups if self._stage else everyone
        self.weight_replicas = groups if self._stage == 3 else everyone

    def __str__(self) -> str:
        return f"stage {self._stage}"

    def weights(self, p: torch.nn.Parameter) -> tuple[torch.Tensor, int] | None:
        if not p.is_contiguous():
            p.data = p.data.contiguous()
        return p.data.view(-1), 0

    def full(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        values = safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)
        return values.detach().view(shape(p))

    def full_gradient(self, p: torch.nn.Parameter) -> torch.Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(p)
        return None if gradient is None else gradient.detach().view(shape(p))

    @property
    def steps(self) -> int:
        return self._engine.global_steps - self._engine.skipped_steps

    def after_load(self, steps: int) -> None:
        self._engine.global_steps, self._engine.skipped_steps = steps, 0
        super().after_load(steps)

    @property
    def loss_scale(self) -> float:
        return float(getattr(self._zero, "loss_scale", 1.0))

    def read_loss_scale(self) -> dict[str, float] | None:
        scaler = self._scaler()
        return {k: getattr(scaler, k) for k in SCALER} if scaler else None

    def write_loss_scale(self, values: dict[str, float] | None) -> str | None:
        scaler = self._scaler()
        if scaler and not values:
            return (
                f"the checkpoint has no fp16 loss scale, so the loss scale starts again at {scaler.cur_scale:g}. "
                "The first steps may be skipped"
            )
        for key, value in (values or {}).items() if scaler else ():
            setattr(scaler, key, value)
        return None

    def _scaler(self) -> Any:
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None


class Replicated(ZeroState):
    """Implements `ShardedState` for ZeRO stage 0, where torch's optimizer steps the complete parameters on every worker."""

    def groups(self) -> list[tuple[torch.Tensor, list[torch.nn.Parameter]]]:
        return [(p, [p]) for _, p in self.trained()]

    def place(self, p: torch.nn.Parameter) -> SlicePlace | None:
        return SlicePlace(p, 0, p.numel(), 0)

    def original(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        return self.full(p, key).view(-1)

    def full(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        return (self.optimizer.state[p][key] if key else p).detach()

    def refresh(self) -> None:
        """Does nothing: the forward pass uses the master weights."""


class Partitioned(ZeroState):
    """Implements `ShardedState` for ZeRO stages 1 and 2, where each worker has a part of every parameter group's flat fp32
    tensor."""

    parts: ClassVar[tuple[str, ...]] = (
        "bit16_groups", "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups", "real_dp_process_group",
        "bit16_groups_flat", "nccl_start_alignment_factor", "allgather_bucket_size",
    )  # fmt: skip

    def groups(self) -> list[tuple[torch.Tensor, list[torch.nn.Parameter]]]:
        return list(zip(self._flats, getattr(self._zero, self.parts[0]), strict=True))

    @property
    def _flats(self) -> list[torch.Tensor]:
        return getattr(self._zero, self.parts[1])

    def place(self, p: Any) -> SlicePlace | None:
        if (mapping := p._hp_mapping) is None:
            return None
        kept, within = mapping.hp_fragment_address, mapping.lp_fragment_address
        return SlicePlace(self._flats[mapping.param_group_index], kept.start, kept.numel, within.start)

    def original(self, p: Any, key: str | None) -> torch.Tensor:
        return p._hp_mapping.get_hp_fragment(key)

    def link(self) -> None:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat, group in self.groups():
            lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.state)

    def refresh(self) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        zero = self._zero
        for i, low in enumerate(zero.parallel_partitioned_bit16_groups):
            low[dist.get_rank(zero.real_dp_process_group[i])].data.copy_(self._flats[i].data)
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )


class SummedApart(Partitioned):
    """Implements `ShardedState` for ZeRO stage 1 in bf16 with gradients summed in fp32, for which DeepSpeed has a separate
    optimizer."""

    parts = ("bf16_groups", "fp32_groups_flat_partition", "update_lp_params")

    def refresh(self) -> None:
        self._zero.update_lp_params()


class Divided(ZeroState):
    """Implements `ShardedState` for ZeRO stage 3, where each worker has a part of every parameter."""

    parts = (
        "fp16_groups", "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "grad_position", "get_param_id",
        "persistent_parameters", "_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters",
        "_get_fp32_opt_state_partition",
    )  # fmt: skip

    def groups(self) -> list[tuple[torch.Tensor, list[torch.nn.Parameter]]]:
        zero = self._zero
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return [(flat, group) for flat, group in pairs if flat is not None]

    def place(self, p: torch.nn.Parameter) -> SlicePlace | None:
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(p)]
        start, numel = _own(p)
        return SlicePlace(self._zero.fp32_partitioned_groups_flat[group], offset, numel, start)

    def original(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        return self._zero._get_fp32_opt_state_partition(p, release_swap_buffers=False, optim_state_key=key)[0]

    def weights(self, p: Any) -> tuple[torch.Tensor, int] | None:
        if p.ds_tensor.numel() < p.ds_tensor.ds_numel:
            return None
        start, numel = _own(p)
        return part(p).view(-1)[:numel], start

    def gathered(self, p: torch.nn.Parameter) -> AbstractContextManager[object]:
        from deepspeed import zero

        return zero.GatheredParameters([p])

    def release(self) -> None:
        self._zero._partition_all_parameters()

    def refresh(self) -> None:
        zero = self._zero
        self.release()
        for low, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            if low is not None:
                low.data.copy_(master.data)
        for group in range(len(zero.fp16_groups)):  # otherwise, swapped-out weights keep their old values
            zero._reassign_or_swap_out_partitioned_parameters(group)
        parameter: Any
        for parameter in self.module.parameters():
            parameter.ds_secondary_tensor = None  # secondary copies have old values (`train.zero.hpz_partition_size`)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        stream_patches.gathers_wait(zero)


def _own(p: Any) -> tuple[int, int]:
    """Returns the start of this worker's slice within its part of a parameter, and the slice's number of elements. With expert
    parallelism, ZeRO shards each part over the workers that have this part."""
    per = p.ds_tensor.ds_numel
    start = min(dist.get_rank(p.ds_process_group) * per, p.ds_numel)
    return start, min(per, p.ds_numel - start)


def partition(partitioner: Any, parameter: torch.nn.Parameter) -> None:
    """Partitions a parameter among the workers of a `deepspeed.zero.Init`. All workers get their part of the first worker's
    values. Collective."""
    partitioner._convert_to_zero_parameters([parameter])
