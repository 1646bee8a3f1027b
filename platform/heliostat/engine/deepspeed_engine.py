"""Builds the DeepSpeed engine of a job.

ZeRO shards optimizer state (stage 1), gradients (stage 2), and parameters (stage 3) over the workers (Rajbhandari et al. 2020,
arXiv 1910.02054). Import this module only in a worker, because `prepare_environment` must run before DeepSpeed is first imported.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from heliostat.config.spec import Job
from heliostat.engine import (
    expert_group,
    first_weights,
    matrix_cut,
    partitioned_weights,
    patches,
    stream_patches,
    tensor_group,
    zero_state,
)
from heliostat.engine.engine_config import engine_config
from heliostat.engine.sample_group import SampleGroup
from heliostat.engine.state_group import StateGroup
from heliostat.errors import ConfigError
from heliostat.parallel import division
from heliostat.recipes import adapters, building, partitioning
from heliostat.recipes.protocol import GUIDE, Recipe

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine as DeepSpeedEngine

_linear = torch.nn.functional.linear
_engines: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()  # engines in memory


def prepare_environment(gpus: float) -> None:
    """Makes DeepSpeed importable and usable on this machine, with or without a C++ compiler."""
    if not gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
    patches.import_without_mlflow()
    patches.import_muon_without_compiler()
    patches.cache_numa_cores()
    patches.silence_memory_reports()
    patches.skip_shared_memory_kernel()


def require_config(job: Job) -> None:
    """Raises ConfigError if DeepSpeed rejects the ZeRO section of the job's config."""
    prepare_environment(job.workers.gpus if torch.cuda.is_available() else 0)  # else DeepSpeed warns that it finds no GPU
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**engine_config(job)["zero_optimization"])
    except ValidationError as e:
        first = e.errors()[0]
        raise ConfigError(
            f"train.deepspeed: zero_optimization.{'.'.join(map(str, first['loc']))}: {first['input']!r}: {first['msg']}. "
            "Correct this key"
        ) from e


def build_model(job: Job, recipe: Recipe, config: dict[str, Any], group: StateGroup | None = None) -> torch.nn.Module:
    """Builds the model with its initial weights, which are equal on every worker. At stage 3, no worker ever has all weights."""
    if job.train.zero.stage < 3:
        model = first_weights.build(job, recipe)
        _require_dimensions(model)
        return model
    with group.dividing() if group else nullcontext():
        read = partitioned_weights.read(job, recipe, config, group.within if group else None)
        model = _build_partitioned(job, recipe, config) if read is None else read
    for p in model.parameters():
        division.note(p, zero_state.shape(p))
    return model


def _build_partitioned(job: Job, recipe: Recipe, config: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(job.train.seed)
    with _partitioned(config):
        return building.build(recipe)


def _require_dimensions(model: torch.nn.Module) -> None:
    """Raises ConfigError for a parameter without dimensions (a scalar), because DeepSpeed doesn't send such parameters to other
    workers."""
    if single := [name for name, p in model.named_parameters() if p.dim() == 0]:
        raise ConfigError(
            f"recipe: the model's parameter {single[0]!r} has no dimensions, so DeepSpeed can't send this parameter to workers. "
            f"Give this parameter the shape [1], or make it a buffer if you don't train it ({GUIDE})"
        )


class ZeroInit:
    """Partitions models with `deepspeed.zero.Init`, for recipes (`heliostat.recipes.partitioning.Partitioner`)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def constructing(self) -> AbstractContextManager[object]:
        from deepspeed import zero

        return zero.Init(config_dict_or_path=self.config)

    def whole(self, parameter: torch.Tensor) -> AbstractContextManager[object]:
        from deepspeed import zero

        return zero.GatheredParameters([parameter], modifier_rank=0)

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        return zero_state.shape(parameter)


@contextmanager
def _partitioned(config: dict[str, Any]) -> Iterator[None]:
    """Opens a context in which models are partitioned during construction, as `config` (DeepSpeed's config) describes."""
    importlib.import_module("torch._dynamo")  # its first import fails under zero.Init
    from transformers.integrations import HfDeepSpeedConfig

    stage = HfDeepSpeedConfig(config)  # while this object exists, transformers partitions models during construction
    with partitioning.by(ZeroInit(stage.config)):
        yield


def build_engine(job: Job, recipe: Recipe, sharing: SampleGroup | None = None) -> DeepSpeedEngine:
    """Builds a DeepSpeedEngine on the process group of the attempt.

    With sequence parallelism (`sharing`), the engine shards state and averages gradients over all workers. With tensor
    parallelism, the engine shards state and averages gradients over the workers that have the same part of each matrix. Raises
    ConfigError if DeepSpeed can't train the model in this parallelism configuration.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    config, within = engine_config(job), job.train.zero.shard_group_size
    group = StateGroup(within) if within and within < dist.get_world_size() else None
    if job.train.zero.hpz_partition_size:
        patches.share_second_copies()
    model = build_model(job, recipe, config, group)
    if job.train.zero.quantize_weights:
        _require_eighths(model)
    expert_group.divide(recipe, model, job.train.parallel.expert)
    train, settings = job.train, job.train.optimizer
    groups = building.parameter_groups(model, settings.weight_decay, recipe, settings.orthogonalizes)
    if settings.averages:
        groups = [{**group, "warmup": train.schedule.warmup_steps} for group in groups]
    hidden = {p for group in groups if group.get("orthogonal") for p in group["params"]}  # before DeepSpeed removes them
    moments = {p: settings.kept(p in hidden) for group in groups for p in group["params"]}
    for block in building.sparse_blocks(model):
        if train.zero.stage in (1, 2) and dist.get_world_size() > 1:
            raise ConfigError(
                f"train.zero.stage: {train.zero.stage} doesn't reduce the gradients of expert modules that only "
                "some workers use. Set train.zero.stage to 3"
            )
        set_z3_leaf_module(
            block, True
        )  # gathered as one unit: otherwise, workers that use different experts would wait for each other
    for block in building.gathered_whole(model):
        set_z3_leaf_module(block, True)
    exact = {name: model.get_buffer(name).float() for name in recipe.exact(model)}
    optimizer = settings.build(groups)
    config |= tensor_group.settings(recipe, model, train.parallel.tensor)
    patches.set_model_parallel_unit(group)
    patches.read_norms(train.precision == "fp16")
    stream_patches.name_reduction()
    if group:
        group.equalize(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False, mpu=group)
    _engines.add(engine)
    if group:
        group.average(engine)
    if engine.device.type == "cuda" and train.zero.stage:
        stream_patches.order_reductions(engine.optimizer)
        if train.zero.stage == 3:
            stream_patches.order_gathers(engine.optimizer)
    for name, values in exact.items():
        building.put_buffer(model, name, values.to(engine.device))
    tensor_group.check(recipe, engine)
    if sharing:
        sharing.join(recipe, engine.module)
    replica = (group.number, group.count) if group else None
    engine.sharded_state = sharded = zero_state.adapter(engine, moments, settings.copies, replica)
    sharded.base = adapters.base_of(recipe, engine.module)
    sharded.prepare()
    if settings.orthogonalizes and train.zero.stage:
        matrix_cut.announce(sharded, hidden, engine.device)
    if job.train.compile == "blocks":
        for block in recipe.blocks(engine.module):
            block.compile()
    elif job.train.compile:
        engine.compile()
    return engine


def _require_eighths(model: torch.nn.Module) -> None:
    """Raises ConfigError unless the workers' shards of every weight are equal, and have a multiple of 8 elements. DeepSpeed's
    kernel would use wrong scales for padded shards."""
    workers = dist.get_world_size()
    for name, p in model.named_parameters():
        numel = division.numel(p)
        if numel % (8 * workers):
            raise ConfigError(
                f"train.zero.quantize_weights: {name} has {numel:,} elements, which {workers} workers can't "
                "divide into equal parts that are multiples of 8. Use another number of workers, or set "
                "train.zero.quantize_weights to false"
            )


def destroy_engines() -> None:
    """Destroys the engines of this process and frees their memory.

    The garbage collector doesn't see some references to an engine: gradient hooks, a cache of ZeRO-3's coordinator, and the
    modules of the last forward pass. Stage 3 also leaves DeepSpeed's own `linear` in torch, which rounds gradients differently.
    """
    if "deepspeed" not in sys.modules:
        return
    torch.nn.functional.linear = _linear
    while _engines:
        _engines.pop().destroy()  # without a variable, which would keep the last engine alive during the collection
    patches.release_modules()
    gc.collect()  # engines are in reference cycles


def forget_groups() -> None:
    """Removes DeepSpeed's process groups, and restarts DeepSpeed's counters of parameters and modules. In a new group, the
    counters of all ranks must be equal."""
    if "deepspeed" not in sys.modules:
        return
    patches.forget_groups()
    patches.restart_numbering()


def set_lr(engine: DeepSpeedEngine, lr: float) -> None:
    """Sets the learning rate of a step: `lr` times the `lr_scale` that the recipe gives each parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def gradient_norm(engine: DeepSpeedEngine, clip: float) -> torch.Tensor:
    """Computes the global gradient norm before clipping, without waiting for the device. Returns a tensor without dimensions on
    the device. The norm is infinite if a gradient isn't finite.

    At stages 1 to 3, returns the norm of the last step. At stage 0, also clips the gradients, so call this function before the
    step.
    """
    if engine.zero_optimization_stage():
        norm = torch.as_tensor(engine.get_global_grad_norm())
        return torch.where(norm < 0, torch.inf, norm)  # DeepSpeed replaces a norm that isn't finite with -1
    if engine.autotp_size() > 1:
        return tensor_group.clipped_norm(engine, clip)
    return torch.nn.utils.clip_grad_norm_(engine.module.parameters(), clip or float("inf"))
