"""Changes DeepSpeed's behavior. Each patch is a function whose docstring names the DeepSpeed version that it was written for.

`zero_state` reads DeepSpeed's state. `pip` may install a version with other private parts, so each function requires a version of
the series `deepspeed~=0.19.8`. The function raises ConfigError for any other version, and if a part that the function needs is
missing. Import DeepSpeed only inside functions, because `prepare_environment` must run first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from heliostat.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

P = ParamSpec("P")
T = TypeVar("T")

VERSION = (0, 19, 8)  # the first of the series, as in `deepspeed~=0.19.8` (pyproject.toml)
PATCHES: list[Callable[..., Any]] = []


@functools.cache
def installed() -> str | None:
    """Reads the version of the installed DeepSpeed without importing it. Returns None if no such package is installed."""
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None


def require_version() -> None:
    """Raises ConfigError if heliostat doesn't know the private parts of the installed DeepSpeed."""
    version = installed()
    if version is not None and not _known(version):  # if it is None, the import reports that DeepSpeed is missing
        raise ConfigError(f"deepspeed: heliostat doesn't support this version ({version}). {_fix()}")


@functools.cache
def _known(version: str) -> bool:
    major, minor, patch = (*map(int, re.findall(r"\d+", version)), 0, 0, 0)[:3]
    return (major, minor) == VERSION[:2] and patch >= VERSION[2]


def _fix() -> str:
    return f"Run: pip install 'deepspeed~={'.'.join(map(str, VERSION))}'"


def guard(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that uses private parts of DeepSpeed raise ConfigError for another version, or if a part is missing."""

    @functools.wraps(function)
    def guarded(*args: P.args, **named: P.kwargs) -> T:
        require_version()
        try:
            return function(*args, **named)
        except (AttributeError, ImportError, LookupError, TypeError) as e:
            if isinstance(e, ImportError) and not (e.name or "").startswith("deepspeed."):
                raise
            raise ConfigError(f"deepspeed: {installed()} doesn't support heliostat's {function.__name__} ({e}). {_fix()}") from e

    return guarded


def _patch(function: Callable[P, T]) -> Callable[P, T]:
    """Guards a patch (see `guard`), and adds the patch to the list `PATCHES`."""
    PATCHES.append(patch := guard(function))
    return patch


def _replace(owner: object, name: str, value: object) -> None:
    """Replaces an attribute of DeepSpeed. Raises AttributeError if the attribute doesn't exist: a new attribute has no effect."""
    getattr(owner, name)
    setattr(owner, name, value)


# importing -----------------------------------------------------------------------------------------------------------


@_patch
def import_without_mlflow() -> None:
    """Imports DeepSpeed and hides MLflow from it, because DeepSpeed's autotuner imports MLflow if it is installed.

    Patch for DeepSpeed 0.19.8. Without it a worker's imports take 11 s instead of 8 s.
    """
    imported = sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    try:
        importlib.import_module("deepspeed")
    finally:
        if imported is None:
            del sys.modules["mlflow"]


@_patch
def import_muon_without_compiler() -> None:
    """Imports DeepSpeed's Muon, which every `initialize` imports, while `torch.compile` does nothing.

    Patch for DeepSpeed 0.19.8. Without it the module decorates a function with the compiler, whose import takes 1 s.
    """

    def same(function: Callable[..., object] | None = None, **_: object) -> Callable[..., object]:
        return function or same

    compiler, torch.compile = torch.compile, same  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compiler


@_patch
def cache_numa_cores() -> None:
    """Makes DeepSpeed ask the system for the cores of NUMA nodes only once.

    Patch for DeepSpeed 0.19.8. Without it ZeRO-3 on a CPU runs the program `numactl` in each reduction.
    """
    numa: Any = importlib.import_module("deepspeed.utils.numa")
    if not hasattr(numa.get_numa_cores, "cache_info"):
        _replace(numa, "get_numa_cores", functools.cache(numa.get_numa_cores))


@_patch
def silence_memory_reports() -> None:
    """Turns off memory reports during the construction of a bf16 optimizer, and limits DeepSpeed's log to errors.

    Patch for DeepSpeed 0.19.8. Without it each bf16 engine collects all garbage six times for its reports, which takes 3 s.
    """
    bf16: Any = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    _replace(bf16, "see_memory_usage", _nothing)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@_patch
def skip_shared_memory_kernel() -> None:
    """Marks the shared-memory all-reduce for CPUs as incompatible, because training never calls it.

    Patch for DeepSpeed 0.19.8. Without it every `initialize` on a CPU compiles the kernel: 27 s, and a crash without g++.
    """
    ops: Any = importlib.import_module("deepspeed.ops")
    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _nothing(*_: object, **__: object) -> None:
    """Does nothing. Replaces functions of DeepSpeed that must have no effect."""


# process groups ------------------------------------------------------------------------------------------------------


@_patch
def share_second_copies() -> None:
    """Makes all parts of a model keep their secondary copies (`train.zero.hpz_partition_size`) in one process group.

    Patch for DeepSpeed 0.19.8 (https://github.com/deepspeedai/DeepSpeed/issues/4901). Without it the second part of a model that
    is partitioned during construction fails: DeepSpeed rejects a second group.
    """
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    make = groups._create_zero_param_parallel_group

    def once(workers: int) -> None:
        if groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is None:
            make(workers)

    if make.__name__ != once.__name__:
        _replace(groups, "_create_zero_param_parallel_group", once)


@_patch
def set_model_parallel_unit(unit: object) -> None:
    """Sets the object that DeepSpeed asks for its process groups. None removes it.

    Patch for DeepSpeed 0.19.8. Without it an engine uses the groups of the previous engine in the same process.
    """
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    _replace(groups, "mpu", unit)


@_patch
def expert_groups(name: str, workers: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Forms groups of `workers` workers that shard experts. Returns this worker's group, and the group of the workers with the
    same experts. `name`: DeepSpeed's name for both groups. Collective.

    Patch for DeepSpeed 0.19.8. Without it DeepSpeed forms groups of experts only for its own mixture layer, which is unused.
    """
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    groups._create_expert_and_data_parallel(workers)
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)


@_patch
def place_expert(parameter: Any, whole: Any, name: str, same_experts: dist.ProcessGroup) -> None:
    """Partitions a parameter in the way of `whole`, a ZeRO-3 parameter, but only over the workers with the same experts.

    Patch for DeepSpeed 0.19.8. Without it ZeRO-3 partitions the parameter over all workers, and so mixes different experts.
    """
    parameter.ds_zero_placement_family = "autoep_expert"  # DeepSpeed's name for parameters that a group has completely
    parameter.ds_zero_partition_group_name, parameter.ds_zero_partition_process_group = name, same_experts
    whole.convert_to_zero_parameters(param_list=[parameter])


@_patch
@contextmanager
def partition_within(group: dist.ProcessGroup) -> Iterator[None]:
    """Makes `deepspeed.zero.Init` partition over the workers of a group inside the context, even where transformers opens it.

    Patch for DeepSpeed 0.19.8. Without it construction partitions a model over all workers, because transformers passes no group.
    """
    init: Any = importlib.import_module("deepspeed.runtime.zero.partition_parameters").Init
    whole = init.__init__
    init.__init__ = functools.partialmethod(whole, data_parallel_group=group)
    try:
        yield
    finally:
        init.__init__ = whole


class MatrixPart(NamedTuple):
    """Describes how AutoTP shards a matrix: complete `shape`, split dimension (`by`), and the `sizes` of the workers' parts."""

    shape: tuple[int, ...]
    by: int
    sizes: tuple[int, ...]


@_patch
def divide_matrices(model: torch.nn.Module, settings: object, workers: int) -> tuple[dist.ProcessGroup, Callable[[], None]]:
    """Replaces a model's linear layers and embeddings with AutoTP's, which contain this worker's part of each matrix. Returns the
    group of the workers that share the matrices, and a function to call after the parameters have their values. Collective.

    Patch for DeepSpeed 0.19.8. Without it AutoTP shards a model only after every worker has built it completely.
    """
    from deepspeed import init_distributed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.module_inject import set_autotp_mode
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.runtime.tensor_parallel.config import get_tensor_parallel_config
    from deepspeed.utils import groups

    init_distributed(get_accelerator().communication_backend_name(), dist_init_required=False)
    set_autotp_mode(training=True)
    groups._init_tp_mesh_device(tensor_model_parallel_size=workers)
    config, group = get_tensor_parallel_config(settings), groups.get_tensor_model_parallel_group()
    autotp: Any = AutoTP(
        module=model, all_reduce_linears=(), prefix="", state_dict=None, orig_layer_impl=None, training_mode=True,
        linear_layer_setting=(torch.nn.Linear, torch.nn.Embedding), model_config=getattr(model, "config", None),
        partition_config=config.get_partition_config_object(),
    )  # fmt: skip
    autotp.set_tensor_parallel_config(workers, group)
    autotp.update_linear_policies()
    autotp._replace_module(model)

    def complete() -> None:
        autotp.register_replicated_grad_hooks(model)
        model.ds_autotp_parsed = True  # type: ignore[assignment]  # so that the engine doesn't shard the model again

    return group, complete


@_patch
def matrix_part(parameter: Any) -> MatrixPart | None:
    """Reads AutoTP's sharding of a parameter. Returns None if AutoTP hasn't sharded the parameter.

    Patch for DeepSpeed 0.19.8. Without it only AutoTP's own checkpoints can read AutoTP's marks.
    """
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

    meta = getattr(parameter, DS_AUTOTP_UC_META, None)
    if not meta or meta["replicated"]:
        return None
    return MatrixPart(tuple(meta["logical_shape"]), meta["partition_dim"], tuple(meta["partition_sizes"]))


@_patch
def stop_input_check(engine: DeepSpeedEngine) -> None:
    """Removes the hook by which an engine with AutoTP sends its first batch to the other workers of its group.

    Patch for DeepSpeed 0.19.8. Without it the engine sends that batch again, after `SampleGroup` has distributed it.
    """
    if engine.first_dataloader_check is not None:
        engine.first_dataloader_check.remove()
        engine.first_dataloader_check = None


@_patch
def release_modules() -> None:
    """Empties the stack of modules and the cache of ZeRO-3's coordinator, which the garbage collector doesn't see.

    Patch for DeepSpeed 0.19.8. Without it a destroyed engine stays in memory.
    """
    offload: Any = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    coordinator: Any = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    offload.FWD_MODULE_STACK.clear()
    kept = vars(coordinator.PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in kept.__closure__:
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


@_patch
def forget_groups() -> None:
    """Removes DeepSpeed's backend and all its process groups.

    Patch for DeepSpeed 0.19.8. Without it an engine on a new process group uses the groups of the previous attempt.
    """
    communication: Any = importlib.import_module("deepspeed.comm.comm")
    _replace(communication, "cdb", None)
    importlib.reload(importlib.import_module("deepspeed.utils.groups"))
    if layer := sys.modules.get("deepspeed.sequence.layer"):
        vars(layer)["_all_to_all_groups"].clear()


@_patch
def restart_numbering() -> None:
    """Makes DeepSpeed number parameters and modules from 0 again. (The counter of modules is in a default argument.)

    Patch for DeepSpeed 0.19.8. Without it a worker that survived an attempt and a new worker number the same parameter
    differently. So they gather different parameters together.
    """
    init: Any = importlib.import_module("deepspeed.runtime.zero.partition_parameters").Init
    offload: Any = importlib.import_module("deepspeed.runtime.zero.parameter_offload").DeepSpeedZeRoOffload
    _replace(init, "param_id", 0)
    (counter,) = offload._register_deepspeed_module.__defaults__
    counter[0] = 0


# the optimizer's state -----------------------------------------------------------------------------------------------

InPlace = Callable[[torch.Tensor], object]


@_patch
def before_step(zero: Any, average: InPlace, equalize: InPlace, agree: InPlace) -> None:
    """Makes a ZeRO-3 optimizer average its gradients over the groups of workers before each step.

    All three functions change a tensor in place, over the groups. `average` averages the gradients, `equalize` sets a norm to the
    first group's norm, and `agree` sets a flag to the groups' largest value. Patch for DeepSpeed 0.19.8. Without it gradients
    can't be averaged over groups: DeepSpeed reduces after every micro-batch, clips and checks for overflow in one call, and knows
    only the workers of one group.
    """
    step, norms, within = zero.step, zero._get_norm_groups, zero.has_overflow

    def equal_norms() -> list[torch.Tensor]:  # groups that sum in another order would clip by different norms
        vectors = [norm.reshape(1) for norm in norms()]
        for norm in vectors:
            equalize(norm)
        return [norm[0] for norm in vectors]

    def averaged(*args: object, **named: object) -> object:
        average(zero.grad_partitions_flat_buffer)
        if (reducing := zero.reduce_and_partition_stream) is not None:  # the stream on which DeepSpeed checks for overflow
            reducing.wait_stream(torch.cuda.current_stream())
        return step(*args, **named)

    def overflow(*args: object, **named: object) -> bool:
        overflowed = torch.tensor(float(within(*args, **named)), device=zero.grad_partitions_flat_buffer.device)
        agree(overflowed)
        return bool(overflowed)

    zero.step, zero._get_norm_groups, zero.has_overflow = averaged, equal_norms, overflow


@_patch
def read_norms(at_once: bool) -> None:
    """Makes ZeRO's optimizers check the gradient norm before every step (`at_once`), as fp16's loss scale needs, or never. If
    never, the training loop checks the norm one step later, and ends the attempt if it isn't finite.

    Patch for DeepSpeed 0.19.8. Without it stages 1 to 3 wait for the device before every step, and with clipping once more.
    """
    utils: Any = importlib.import_module("deepspeed.runtime.utils")
    names = ("bf16_optimizer", "zero.stage_1_and_2", "zero.stage3")
    bf16, *zero = (importlib.import_module(f"deepspeed.runtime.{name}") for name in names)
    for module in (bf16, *zero):
        _replace(module, "is_invalid_grad_norm", utils.is_invalid_grad_norm if at_once else _nothing)
    for module in (utils, *zero):
        _replace(module, "mask_nan_or_inf_with_val_inplace", _mark)
    _replace(bf16, "clip_tensors_by_global_norm", _clip)


def _mark(norm: torch.Tensor, device: object = None) -> None:
    """Replaces a norm that isn't finite with -1, as DeepSpeed does with a number that it uploads."""
    norm.masked_fill_(~norm.isfinite(), -1.0)


def _clip(input_tensors: list[torch.Tensor], max_norm: float, global_norm: torch.Tensor, mpu: object = None) -> None:
    """Clips gradients on the device by a factor of at most 1. DeepSpeed would read this factor on the host."""
    factor = (max_norm / (global_norm + 1e-6)).clamp(max=1)
    for tensor in input_tensors:
        tensor.detach().mul_(factor)
