"""Builds the DeepSpeed config of a job. This module imports neither torch nor DeepSpeed, so a plan can use it."""

from __future__ import annotations

from typing import Any

from heliostat.config import spec
from heliostat.config.spec import Job

CPU_BUCKET = 32_000_000  # elements; at every bucket, the workers wait for each other


def engine_config(job: Job) -> dict[str, Any]:
    """Builds the DeepSpeed config of a job. Each key of `train.deepspeed` replaces the same key of this config."""
    train, offload = job.train, job.train.zero.offload
    zero: dict[str, Any] = {"stage": train.zero.stage}
    if not job.workers.gpus:
        zero |= {
            "reduce_bucket_size": CPU_BUCKET,
            "allgather_bucket_size": CPU_BUCKET,
            "stage3_prefetch_bucket_size": CPU_BUCKET,
            # persistent parameters would be gathered one by one after every step, with a wait for each
            "stage3_param_persistence_threshold": 0,
        }
    else:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    if offload.optimizer:
        zero["offload_optimizer"] = {"device": offload.optimizer, "pin_memory": bool(job.workers.gpus)}
    if offload.param:
        where = {"nvme_path": offload.nvme_path} if offload.nvme_path else {}
        zero["offload_param"] = {"device": offload.param, "pin_memory": bool(job.workers.gpus), **where}
    if train.zero.hpz_partition_size:
        zero["zero_hpz_partition_size"] = train.zero.hpz_partition_size
    if train.zero.quantize_weights:
        zero["zero_quantized_weights"] = True
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": job.accumulation,
        "zero_optimization": zero,
        # at stage 0 the training loop clips, because DeepSpeed doesn't return the norm
        "gradient_clipping": train.grad_clip if train.zero.stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is as fast and needs no compiler
        "wall_clock_breakdown": False,
        "steps_per_print": 2**62,
        "timers": {
            "throughput": {"enabled": False}
        },  # the timer waits for the device twice per micro-batch; the ledger measures instead
    }
    if train.precision != "fp32":
        config[train.precision] = {"enabled": True}
        if train.precision == "bf16":  # the check makes every step wait for the device; the loop checks the norm one step later
            config["bf16"]["check_grad_overflow"] = False
        if spec.settle(job, None).train.grad_accum_dtype == "fp32" and job.accumulation > 1:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            if train.precision == "bf16":  # ZeRO-1 adds each gradient to its sum, and frees it, as soon as it is computed
                config["bf16"]["immediate_grad_update"] = True
    return _merge(config, train.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _merge(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **nested}
