"""Marks the parts of a step for profilers: ranges in traces of `torch.profiler`, and NVTX ranges for Nsight Systems.

    with device_ranges.named("forward"): loss = recipe.loss(model, batch)

Ranges are on while a profile runs, and in every process that `nsys` profiles. Otherwise `named` returns a context that does
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

OF_NSYS = ("NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH")  # variables that nsys sets in profiled processes

_OFF = nullcontext()
_profiles = 0  # profiles that run in this process


def named(name: str) -> AbstractContextManager[object]:
    """Returns a context that marks a part of a step: `batch`, `forward`, `backward`, `reduce`, `optimizer`, or `save`."""
    return _range(name) if _profiles or _nsys else _OFF


@contextmanager
def shown() -> Iterator[None]:
    """Makes `named` mark its code as ranges in the device's profiler, within the context."""
    global _profiles
    _profiles += 1
    try:
        yield
    finally:
        _profiles -= 1


@contextmanager
def _range(name: str) -> Iterator[None]:
    on_gpu = torch.cuda.is_initialized()
    with record_function(name):
        if on_gpu:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()


_nsys = any(os.environ.get(name) for name in OF_NSYS)
