"""Starts threads on the process's own GPU: CUDA starts every thread on the first one.

A thread that touches CUDA there makes a context on the first GPU, some hundred MiB for each worker of the node. So whatever runs
in a worker's process takes its threads from here. A thread that outlives an attempt must not touch CUDA: the process may get
another GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_gpu: int | None = None


def use(gpu: int) -> None:
    """Makes a GPU the current one, of this thread and of those that are started from now on."""
    global _gpu
    _gpu = gpu
    _enter()


def thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Starts a daemon thread."""

    def run() -> None:
        _enter()
        target()

    started = threading.Thread(target=run, name=name, daemon=True)
    started.start()
    return started


def pool(threads: int, name: str = "") -> ThreadPoolExecutor:
    """Makes a pool of threads, which start with their first tasks."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_enter)


def _enter() -> None:
    """Makes the process's GPU this thread's current one."""
    if _gpu is not None:
        import torch

        torch.cuda.set_device(_gpu)
