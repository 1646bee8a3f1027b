"""Checks the keys of `train.deepspeed`: those that change a step's speed or memory may be set, those that change its result not.

Everything else is refused, with the key of the job file that does it: DeepSpeed would take a second word on the batch, the
precision or the sharding, and heliostat's data order, loss and checkpoints would go by the first. Also refused are settings of
what the job does not have, as of a loss scale in bf16. (Settings of another ZeRO stage are taken, so that a job can change it.)
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
    """Page-locked memory: faster to copy, and not for others."""
    buffer_count: Positive = 4
    """Buffers of optimizer state."""


class OffloadParam(Strict):
    pin_memory: bool = True
    """Page-locked memory: faster to copy, and not for others."""
    buffer_count: Positive = 5
    """Buffers of weights."""
    buffer_size: Positive = 100_000_000
    """Elements of a buffer."""
    max_in_cpu: Elements = 1_000_000_000
    """Elements that stay in host memory with NVMe."""


class ZeroKeys(Strict):
    reduce_bucket_size: Positive = 500_000_000
    """Elements that are reduced together."""
    allgather_bucket_size: Positive = 500_000_000
    """Elements that are gathered together."""
    overlap_comm: bool = False
    """Reduces gradients during the backward pass, with twice the buckets."""
    contiguous_gradients: bool = True
    """Copies gradients into one buffer as they are made."""
    reduce_scatter: bool = True
    """Reduce-scatter in place of all-reduce."""
    allgather_partitions: bool = True
    """All-gather in place of broadcasts."""
    use_multi_rank_bucket_allreduce: bool = True
    """One all-reduce of a bucket that several workers own parts of."""
    sub_group_size: Positive = 1_000_000_000
    """Elements that the optimizer steps at a time, at stage 3."""
    stage3_prefetch_bucket_size: Elements = 50_000_000
    """Elements that are gathered ahead."""
    stage3_param_persistence_threshold: Elements = 100_000
    """Parameters of fewer elements are kept whole on every worker."""
    stage3_model_persistence_threshold: Elements = 1 << 62
    """Elements that may be kept so in all."""
    stage3_max_live_parameters: Elements = 1_000_000_000
    """Elements that are gathered at the same time, at most."""
    stage3_max_reuse_distance: Elements = 1_000_000_000
    """A parameter that is used again within so many elements is not given back."""
    stage3_module_granularity_threshold: Elements = 0
    """Modules of smaller parts than that are gathered whole; 0: none are."""
    stage3_use_all_reduce_for_fetch_params: bool = False
    """Gathers parameters by all-reduce."""
    stage3_allgather_sequential: bool = False
    """Gathers parameters one after another."""
    memory_efficient_linear: bool = True
    """A linear layer that keeps no gathered weight for the backward pass."""
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    """With `train.zero.offload.optimizer`."""
    offload_param: OffloadParam = OffloadParam()
    """With `train.zero.offload.param`."""


class Fp16(Strict):
    loss_scale: Annotated[Float, Field(ge=0)] = 0.0
    """Fixed; 0 finds it as the run goes."""
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] = 16
    """The first scale is 2 to this power."""
    loss_scale_window: Positive = 1000
    """Steps without an overflow, after which the scale is doubled."""
    hysteresis: Positive = 2
    """Overflows, after which it is halved."""
    consecutive_hysteresis: bool = False
    """A step without an overflow resets their count."""
    min_loss_scale: Positive = 1
    """It does not fall below."""


class Aio(Strict):
    block_size: Positive = 1 << 20
    """Bytes of a request."""
    queue_depth: Positive = 8
    """Requests under way."""
    intra_op_parallelism: Positive = 1
    """Threads of an operation."""
    single_submit: bool = False
    """Submits requests one by one."""
    overlap_events: bool = True
    """Submits while others are waited for."""


class Allowed(Strict):
    """Lists the keys that are taken. Defaults are DeepSpeed's, for the reader; only what the job names is passed on."""

    zero_optimization: ZeroKeys = ZeroKeys()
    """Buckets, buffers and prefetching."""
    fp16: Fp16 = Fp16()
    """The loss scale, with `train.precision: fp16`."""
    aio: Aio = Aio()
    """Reading and writing NVMe, with `train.zero.offload.param: nvme`."""
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    """In which gradients travel between workers. Unset: what the precision is."""


SET = "heliostat sets it"
STAGES = "no key does it: models are not cut into stages; use train.zero, or train.parallel"
OFFLOAD = "use train.zero.offload"
MLFLOW = "losses and rates are in MLflow (mlflow.uri)"
INSTEAD = {
    "train_batch_size": "use train.global_batch_size",
    "train_micro_batch_size_per_gpu": "use train.micro_batch_size",
    "gradient_accumulation_steps": "follows from train.global_batch_size, train.micro_batch_size and workers.count; change those",
    "managed_gradient_accumulation": SET,
    "gradient_clipping": "use train.grad_clip",
    "prescale_gradients": SET,
    "gradient_predivide_factor": SET,
    "gradient_allreduce_op": SET,
    "optimizer": "use train.optimizer",
    "scheduler": "use train.schedule",
    "bf16": "use train.precision",
    "bfloat16": "use train.precision",
    "torch_autocast": "use train.precision",
    "amp": "use train.precision",
    "fp16.enabled": "use train.precision",
    "fp16.auto_cast": "use train.precision",
    "fp16.fp16_master_weights_and_grads": "use train.precision; masters are always fp32",
    "data_types": "use train.grad_accum_dtype (fp32 or same) and train.precision",
    "zero_optimization.stage": "use train.zero.stage",
    "zero_optimization.offload_optimizer.device": "use train.zero.offload.optimizer",
    "zero_optimization.offload_optimizer.nvme_path": OFFLOAD,
    "zero_optimization.offload_param.device": "use train.zero.offload.param",
    "zero_optimization.offload_param.nvme_path": "use train.zero.offload.nvme_path",
    "zero_optimization.cpu_offload": "use train.zero.offload.optimizer",
    "zero_optimization.cpu_offload_param": "use train.zero.offload.param",
    "zero_optimization.cpu_offload_use_pin_memory": OFFLOAD,
    "zero_optimization.load_from_fp32_weights": "heliostat's checkpoints always hold fp32 masters (checkpoint)",
    "zero_optimization.elastic_checkpoint": "heliostat's checkpoints load on any number of workers (checkpoint)",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "use `heliostat model export`",
    "zero_optimization.zero_hpz_partition_size": "use train.zero.hpz_partition_size",
    "zero_optimization.zero_quantized_weights": "use train.zero.quantize_weights",
    "zero_optimization.zero_quantized_nontrainable_weights": "would round weights that a checkpoint holds",
    "zero_optimization.zero_quantized_gradients": QUANTIZED_GRADIENTS,
    "zero_optimization.mics_shard_size": "use train.zero.shard_group_size",
    "zero_optimization.mics_hierarchical_params_gather": "use train.zero.shard_group_size",
    "zero_optimization.zeropp_loco_param": "what it carries from step to step would be in no checkpoint",
    "activation_checkpointing": "use train.activation_checkpointing",
    "compile": f"use train.compile (DeepCompile is not supported: {DEEPCOMPILE})",
    "sequence_parallel_size": "use train.parallel.sequence",
    "checkpoint": "use checkpoint",
    "load_universal_checkpoint": "heliostat's checkpoints load at any stage (checkpoint)",
    "seed": "use train.seed",
    "elasticity": "use workers.count: [least, most]",
    "data_efficiency": "use data.mix_schedule",
    "curriculum_learning": "use data.mix_schedule",
    "dataloader_drop_last": "use train.global_batch_size; every step has a whole batch",
    "steps_per_print": "use train.log_every",
    "timers": "they would wait for the GPU in every micro-batch; the ledger says where the time went (`heliostat run goodput`)",
    "wall_clock_breakdown": "the ledger says where the time went (`heliostat run goodput`)",
    "memory_breakdown": "`heliostat plan` says what memory is needed",
    "dump_state": "`heliostat check` shows what is wrong with a job",
    "flops_profiler": MLFLOW,
    "comms_logger": "the ledger says where the time went (`heliostat run goodput`)",
    "tensorboard": MLFLOW,
    "wandb": MLFLOW,
    "csv_monitor": MLFLOW,
    "comet": MLFLOW,
    "zero_allow_untested_optimizer": SET,
    "zero_force_ds_cpu_optimizer": SET,
    "tensor_parallel": "use train.parallel.tensor",
    "autotp": "use train.parallel.tensor",
    "autotp_size": "use train.parallel.tensor",
    "pipeline": STAGES,
    "expert_parallel": "use train.parallel.expert",
    "data_parallel_size": "use workers.count",
}


def faults(job: Job) -> list[str]:
    """Lists one line for each key that `train.deepspeed` may not hold, or holds with a wrong value."""
    section = job.train.deepspeed
    lines = [f"train.deepspeed.{key}: is not taken here: {INSTEAD[key]}" for key in INSTEAD if _has(section, key)]
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
        f"train.deepspeed.{key}: would be ignored; it needs {need}" for key, met, need in needs if _has(section, key) and not met
    ]
    return lines


def _has(section: object, key: str) -> bool:
    head, _, rest = key.partition(".")
    return isinstance(section, dict) and head in section and (not rest or _has(section[head], rest))


def _without(section: dict[str, object], keys: list[str]) -> dict[str, object]:
    """Copies the mapping without the keys that have an error line of their own."""
    below = {k: [key.partition(".")[2] for key in keys if key.startswith(f"{k}.")] for k in section}
    return {k: _without(v, below[k]) if isinstance(v, dict) else v for k, v in section.items() if k not in keys}
