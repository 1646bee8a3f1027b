"""The twin: a device `cuda` whose memory is the host's, and which keeps a GPU's rules. For a process of its own: it stays.

Kernels are the CPU's, so numbers are those of the CPU, while memory, streams, events, generators, and threads are the device's:

- A tensor on it is no CPU tensor. Mixing devices raises, `.to(device)` and `.cpu()` copy, views share memory, and fresh memory
  holds NaN.
- Every host read, synchronization, and upload is recorded with its line (`traffic`).
- Work of a stream is visible to another one that waits for it; else its use raises. A copy to pinned memory arrives when the host
  waits for it, and the source of an upload must stay as it is until then.
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
    """Makes DeepSpeed use the twin as the GPU that it is, and this rank one of the two devices, as a worker's process does; to be
    called before the first engine is built."""
    start()
    local = int(os.environ.get("RANK", 0)) % 2
    os.environ["LOCAL_RANK"] = str(local)  # which DeepSpeed takes for its device's number
    device_threads.use(local)
    from deepspeed.accelerator import cuda_accelerator, real_accelerator

    real_accelerator.set_accelerator(cuda_accelerator.CUDA_Accelerator())
