"""Simulates a device `cuda` with the host's memory and a GPU's rules. Needs a separate process, because it can't be undone.

Kernels are the CPU's, so numbers are those of the CPU. Memory, streams, events, generators, and threads are the device's:

- A tensor on it isn't a CPU tensor. Mixing devices raises an error, `.to(device)` and `.cpu()` copy, views share memory, and
  fresh memory holds NaN.
- Every host read, synchronization, and upload is recorded with its line (`traffic`).
- Work of a stream is visible to another stream only after a wait; else its use raises an error. A copy to pinned memory arrives
  when the host waits for it. Until then, the source of an upload must not change.
- It has two devices, and a new thread starts on the first.
"""

from __future__ import annotations

import functools
import os

import torch
from heliostat.data import device_threads

from tests.twin import build, cuda, traffic


@functools.cache
def start() -> None:
    """Makes this process one with a GPU."""
    assert not torch.cuda.is_available(), "this machine has a GPU: the twin would hide it"
    native = build.load()
    native.listen(traffic.listen)
    cuda.install(native)


def start_deepspeed() -> None:
    """Makes DeepSpeed use the simulated device as a GPU, and assigns one of the two devices to this rank, like a worker's
    process.

    Call it before the first engine is built.
    """
    start()
    local = int(os.environ.get("RANK", 0)) % 2
    os.environ["LOCAL_RANK"] = str(local)  # which DeepSpeed takes for its device's number
    device_threads.use(local)
    from deepspeed.accelerator import cuda_accelerator, real_accelerator

    real_accelerator.set_accelerator(cuda_accelerator.CUDA_Accelerator())
