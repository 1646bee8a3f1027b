"""Starts threads on the process's own GPU, because CUDA starts every thread on GPU 0.

A thread that touches CUDA on GPU 0 creates a context there: some hundred MiB for each worker of the node. So all code in a
worker's process gets its threads from this module. A thread that outlives an attempt must not touch CUDA, because the process may
get another GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_gpu: int | None = None


def use(gpu: int) -> None:
    """Makes a GPU, given by its index, the current device of this thread and of the threads that this module starts later."""
    global _gpu
    _gpu = gpu
    _enter()


def thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Starts a daemon thread on the process's GPU."""

    def run() -> None:
        _enter()
        target()

    started = threading.Thread(target=run, name=name, daemon=True)
    started.start()
    return started


def pool(threads: int, name: str = "") -> ThreadPoolExecutor:
    """Makes a pool of threads on the process's GPU. The threads start with the first tasks."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_enter)


def _enter() -> None:
    """Makes the process's GPU the current device of this thread."""
    if _gpu is not None:
        import torch

        torch.cuda.set_device(_gpu)
