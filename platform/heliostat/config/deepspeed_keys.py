"""Checks the keys of `train.deepspeed`. Keys that change only a step's speed or memory are supported.

A key that changes a step's result is an error. The error names the job key to use instead. The data order, the loss, and
checkpoints depend on the job's batch sizes, precision, and sharding, so a second value in `train.deepspeed` could contradict the
job's value. Settings without effect, such as a loss scale in bf16, are errors, too. Settings for a different ZeRO stage are
accepted, so a job can change its stage.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from heliostat.config.fields import Positive
from heliostat.config.spec import Job
from heliostat.config.train_section import DEEPCOMPILE, QUANTIZED_GRADIENTS
from heliostat.schema import Float, Strict, explain

Elements = Annotated[int, Field(ge=0)]


class OffloadOptimizer(Strict):
    pin_memory: bool = True
    """Page-locked memory: copies are faster, but other processes can't use this memory."""
    buffer_count: Positive = 4
    """Number of buffers of optimizer state."""


class OffloadParam(Strict):
    pin_memory: bool = True
    """Page-locked memory: copies are faster, but other processes can't use this memory."""
    buffer_count: Positive = 5
    """Number of buffers of weights."""
    buffer_size: Positive = 100_000_000
    """Number of elements per buffer."""
    max_in_cpu: Elements = 1_000_000_000
    """Number of elements that stay in host memory when other elements are on NVMe."""


class ZeroKeys(Strict):
    reduce_bucket_size: Positive = 500_000_000
    """Number of gradient elements per reduction."""
    allgather_bucket_size: Positive = 500_000_000
    """Number of parameter elements per all-gather."""
    overlap_comm: bool = False
    """Reduces gradients during the backward pass, which needs twice the buckets."""
    contiguous_gradients: bool = True
    """Copies gradients into one buffer as soon as they are computed."""
    reduce_scatter: bool = True
    """Uses reduce-scatter instead of all-reduce."""
    allgather_partitions: bool = True
    """Uses all-gather instead of broadcasts."""
    use_multi_rank_bucket_allreduce: bool = True
    """Uses one all-reduce for a bucket whose parts belong to several workers."""
    sub_group_size: Positive = 1_000_000_000
    """Number of elements that the optimizer updates at once at stage 3."""
    stage3_prefetch_bucket_size: Elements = 50_000_000
    """Maximum number of parameter elements to gather before they are used."""
    stage3_param_persistence_threshold: Elements = 100_000
    """Maximum number of elements of a parameter that stays complete on every worker."""
    stage3_model_persistence_threshold: Elements = 1 << 62
    """Maximum number of elements, in total, of the parameters that stay complete on every worker."""
    stage3_max_live_parameters: Elements = 1_000_000_000
    """Maximum number of parameter elements that are gathered at the same time."""
    stage3_max_reuse_distance: Elements = 1_000_000_000
    """Keeps a gathered parameter if it is used again within this number of elements."""
    stage3_module_granularity_threshold: Elements = 0
    """Gathers a module and its submodules at once if the submodules have fewer elements than this value; 0: never."""
    stage3_use_all_reduce_for_fetch_params: bool = False
    """Gathers parameters by all-reduce."""
    stage3_allgather_sequential: bool = False
    """Gathers parameters one after another."""
    memory_efficient_linear: bool = True
    """Uses a linear layer that doesn't keep the gathered weight for the backward pass."""
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    """Settings for `train.zero.offload.optimizer`."""
    offload_param: OffloadParam = OffloadParam()
    """Settings for `train.zero.offload.param`."""


class Fp16(Strict):
    loss_scale: Annotated[Float, Field(ge=0)] = 0.0
    """Fixed loss scale. With 0, DeepSpeed adjusts the loss scale during the run."""
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    """Exponent of the initial loss scale: the scale begins at 2 to this power."""
    loss_scale_window: Positive = 1000
    """Number of steps without an overflow after which DeepSpeed doubles the loss scale."""
    hysteresis: Positive = 2
    """Number of overflows after which DeepSpeed halves the loss scale."""
    consecutive_hysteresis: bool = False
    """Resets the overflow count after a step without an overflow."""
    min_loss_scale: Positive = 1
    """Minimum loss scale."""


class Aio(Strict):
    block_size: Positive = 1 << 20
    """Bytes per I/O request."""
    queue_depth: Positive = 8
    """Concurrent requests."""
    intra_op_parallelism: Positive = 1
    """Number of threads per I/O operation."""
    single_submit: bool = False
    """Submits I/O requests one by one."""
    overlap_events: bool = True
    """Submits I/O requests while earlier requests are still running."""


class Allowed(Strict):
    """Lists the supported keys. The defaults here document DeepSpeed's defaults. Only keys that the job sets are passed to
    DeepSpeed."""

    zero_optimization: ZeroKeys = ZeroKeys()
    """Settings of buckets, buffers, and prefetching."""
    fp16: Fp16 = Fp16()
    """Settings of the loss scale for `train.precision: fp16`."""
    aio: Aio = Aio()
    """Settings for reading and writing NVMe with `train.zero.offload.param: nvme`."""
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of gradients in transfers between workers. Unset: the training precision."""


SET = "heliostat sets this key. Remove it from the job"
STAGES = "heliostat doesn't split models into pipeline stages. Use train.zero.stage 3 or train.parallel"
OFFLOAD = "Use train.zero.offload"
MLFLOW = "Losses and rates are in MLflow (mlflow.uri). Remove this key"
GOODPUT = "This timer waits for the GPU in every micro-batch. Use `heliostat run goodput`, which shows where the time goes"
MASTERS = (
    "Master weights and optimizer state are always fp32, because 16 bits round small updates away "
    "(docs/training/precision.md#fp32-master-weights). Remove this key, and use train.precision"
)
INSTEAD = {
    "train_batch_size": "Use train.global_batch_size",
    "train_micro_batch_size_per_gpu": "Use train.micro_batch_size",
    "gradient_accumulation_steps": (
        "This number follows from train.global_batch_size, train.micro_batch_size, and workers.count. Remove this key"
    ),
    "managed_gradient_accumulation": SET,
    "gradient_clipping": "Use train.grad_clip",
    "prescale_gradients": SET,
    "gradient_predivide_factor": SET,
    "gradient_allreduce_op": SET,
    "optimizer": "Use train.optimizer",
    "scheduler": "Use train.schedule",
    "bf16.bf16_master_weights_and_grads": MASTERS,
    "bf16.bf16_optimizer_states": MASTERS,
    "bfloat16.bf16_master_weights_and_grads": MASTERS,
    "bfloat16.bf16_optimizer_states": MASTERS,
    "fp16.fp16_master_weights_and_grads": MASTERS,
    "bf16": "Use train.precision",
    "bfloat16": "Use train.precision",
    "torch_autocast": "Use train.precision",
    "amp": "Use train.precision",
    "fp16.enabled": "Use train.precision",
    "fp16.auto_cast": "Use train.precision",
    "data_types": "Use train.grad_accum_dtype (fp32 or same) and train.precision",
    "zero_optimization.stage": "Use train.zero.stage",
    "zero_optimization.offload_optimizer.device": "Use train.zero.offload.optimizer",
    "zero_optimization.offload_optimizer.nvme_path": OFFLOAD,
    "zero_optimization.offload_param.device": "Use train.zero.offload.param",
    "zero_optimization.offload_param.nvme_path": "Use train.zero.offload.nvme_path",
    "zero_optimization.cpu_offload": "Use train.zero.offload.optimizer",
    "zero_optimization.cpu_offload_param": "Use train.zero.offload.param",
    "zero_optimization.cpu_offload_use_pin_memory": OFFLOAD,
    "zero_optimization.load_from_fp32_weights": "heliostat's checkpoints always contain fp32 master weights. Remove this key",
    "zero_optimization.elastic_checkpoint": "heliostat's checkpoints load on any number of workers. Remove this key",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "Use `heliostat model export`",
    "zero_optimization.zero_hpz_partition_size": "Use train.zero.hpz_partition_size",
    "zero_optimization.zero_quantized_weights": "Use train.zero.quantize_weights",
    "zero_optimization.zero_quantized_nontrainable_weights": "This key would round weights that checkpoints contain. Remove it",
    "zero_optimization.zero_quantized_gradients": f"{QUANTIZED_GRADIENTS}. Remove this key",
    "zero_optimization.mics_shard_size": "Use train.zero.shard_group_size",
    "zero_optimization.mics_hierarchical_params_gather": "Use train.zero.shard_group_size",
    "zero_optimization.zeropp_loco_param": "The state of LoCo would be missing from checkpoints. Remove this key",
    "activation_checkpointing": "Use train.activation_checkpointing",
    "compile": f"Use train.compile. DeepCompile isn't supported: {DEEPCOMPILE}",
    "sequence_parallel_size": "Use train.parallel.sequence",
    "checkpoint": "Use checkpoint",
    "load_universal_checkpoint": "heliostat's checkpoints load at any ZeRO stage. Remove this key",
    "seed": "Use train.seed",
    "elasticity": "Use workers.count: [least, most]",
    "data_efficiency": "Use data.mix_schedule",
    "curriculum_learning": "Use data.mix_schedule",
    "dataloader_drop_last": "Every step has a complete batch. Remove this key",
    "steps_per_print": "Use train.log_every",
    "timers": GOODPUT,
    "wall_clock_breakdown": GOODPUT,
    "memory_breakdown": "Use `heliostat plan`, which shows the memory that a job needs",
    "dump_state": "Use `heliostat check`, which shows the errors of a job",
    "flops_profiler": MLFLOW,
    "comms_logger": "Use `heliostat run goodput` or `heliostat debug profile`",
    "tensorboard": MLFLOW,
    "wandb": MLFLOW,
    "csv_monitor": MLFLOW,
    "comet": MLFLOW,
    "zero_allow_untested_optimizer": SET,
    "zero_force_ds_cpu_optimizer": SET,
    "tensor_parallel": "Use train.parallel.tensor",
    "autotp": "Use train.parallel.tensor",
    "autotp_size": "Use train.parallel.tensor",
    "pipeline": STAGES,
    "expert_parallel": "Use train.parallel.expert",
    "data_parallel_size": "Use workers.count",
}


def faults(job: Job) -> list[str]:
    """Lists the faults of `train.deepspeed`, one line per fault. A fault is a key that isn't supported, or a wrong value."""
    section = job.train.deepspeed
    present = [key for key in INSTEAD if _has(section, key)]
    nearest = [key for key in present if not any(other.startswith(f"{key}.") for other in present)]
    lines = [f"train.deepspeed.{key}: not supported. {INSTEAD[key]}" for key in nearest]
    try:
        Allowed.model_validate(_without(section, list(INSTEAD)))
    except ValidationError as e:
        lines += explain(e, Allowed, "train.deepspeed")
    offload = job.train.zero.offload
    needs = [
        ("fp16", job.train.precision == "fp16", "train.precision fp16"),
        ("aio", offload.param == "nvme", "train.zero.offload.param nvme"),
        ("zero_optimization.offload_optimizer", bool(offload.optimizer), "train.zero.offload.optimizer"),
        ("zero_optimization.offload_param", bool(offload.param), "train.zero.offload.param"),
    ]
    lines += [
        f"train.deepspeed.{key}: has no effect without {need}. Remove this key"
        for key, met, need in needs
        if _has(section, key) and not met
    ]
    return lines


def _has(section: object, key: str) -> bool:
    head, _, rest = key.partition(".")
    return isinstance(section, dict) and head in section and (not rest or _has(section[head], rest))


def _without(section: dict[str, object], keys: list[str]) -> dict[str, object]:
    """Copies the section without the keys in `keys`, because these keys already have an error line."""
    below = {k: [key.partition(".")[2] for key in keys if key.startswith(f"{k}.")] for k in section}
    return {k: _without(v, below[k]) if isinstance(v, dict) else v for k, v in section.items() if k not in keys}
