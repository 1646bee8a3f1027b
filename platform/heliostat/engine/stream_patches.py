"""Orders DeepSpeed's CUDA streams on the GPU, and names its gradient reduction for profilers.

DeepSpeed makes the host wait for one stream, and doesn't order the work of another stream.

CUDA streams run concurrently: a stream sees another stream's writes only if the stream waits for these writes. `tests/twin` is a
simulated device that raises an error if an operation uses memory for which its stream hasn't waited. So this simulation shows
which streams must wait.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from heliostat.data import device_ranges
from heliostat.engine.patches import _nothing, _patch, _replace


@_patch
def order_reductions(zero: Any) -> None:
    """Makes work that is queued after a backward pass wait on the GPU for ZeRO's reductions, while the host continues.

    With `train.zero.offload.optimizer`, the host still waits, because the host reads the summed gradients from its own memory.
    Patch for DeepSpeed 0.19.8. Without it the host waits for the GPU after every micro-batch at stages 2 and 3, and then the GPU
    waits for the host.
    """
    if hasattr(zero, "reduce_and_partition_stream"):
        if not zero.offload_optimizer:
            reducing = zero.reduce_and_partition_stream
            _replace(reducing, "synchronize", lambda: torch.cuda.current_stream().wait_stream(reducing))
    elif getattr(zero, "overlap_comm", False) and zero.contiguous_gradients and not zero.cpu_offload:
        _order_epilogue(zero)


def _order_epilogue(zero: Any) -> None:
    """Makes ZeRO-1 and ZeRO-2 end a backward pass in the same way as without `overlap_comm`, after the last reductions are
    queued."""
    reduce, epilogue = zero.reduce_ipg_grads, zero.independent_gradient_partition_epilogue

    def ordered() -> None:
        reduce()
        torch.cuda.current_stream().wait_stream(zero.reduction_stream)
        zero.overlap_comm, zero.reduce_ipg_grads = False, _nothing
        try:
            epilogue()
        finally:
            zero.overlap_comm, zero.reduce_ipg_grads = True, reduce

    zero.independent_gradient_partition_epilogue = ordered


@_patch
def order_gathers(zero: Any) -> None:
    """Makes ZeRO-3's gathers on a GPU wait for the weights that each step writes.

    Patch for DeepSpeed 0.19.8. Without it a forward pass can gather weights from before the step if no parameter is persistent
    (`stage3_param_persistence_threshold: 0`). DeepSpeed waits for the GPU only while it gathers persistent parameters.
    """
    step = zero.step

    def ordered(*args: object, **named: object) -> object:
        stepped = step(*args, **named)
        gathers_wait(zero)
        return stepped

    zero.step = ordered


@_patch
def gathers_wait(zero: Any) -> None:
    """Makes ZeRO-3's next gathers wait for the work that is queued on the current stream. Does nothing on a CPU.

    Patch for DeepSpeed 0.19.8. Without it a forward pass after a restore can gather weights that are only partly written.
    """
    gathering = vars(zero.parameter_offload)["_DeepSpeedZeRoOffload__allgather_stream"]
    if gathering is not None:
        gathering.wait_stream(torch.cuda.current_stream())


@_patch
def name_reduction() -> None:
    """Marks the gradient reduction for profilers, except its part inside the backward pass.

    Patch for DeepSpeed 0.19.8. Without it a trace doesn't show where the backward pass ends and the reduction begins.
    """
    engine: Any = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    reduce = engine.allreduce_gradients
    if hasattr(reduce, "is_named"):
        return

    def named(*arguments: object, **options: object) -> object:
        with device_ranges.named("reduce"):
            return reduce(*arguments, **options)

    named.is_named = True  # type: ignore[attr-defined]
    _replace(engine, "allreduce_gradients", named)
