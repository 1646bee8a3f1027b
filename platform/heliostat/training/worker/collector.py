"""Keeps Python's garbage collector off the step path.

By default, the collector runs after some number of new objects, so it runs in a different step on each worker. All other workers
then wait in the next collective for the worker whose collector runs. Here, the collector runs between steps, after the same steps
on all workers. It collects young objects after every EVERY-th step, and all objects after evaluations and saves.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from heliostat.training.worker.context import Due, Hook

EVERY = 10  # steps; garbage in reference cycles can hold a step's tensors, so it must not stay for long


def spare_imports() -> None:
    """Excludes all objects that exist so far, such as imported modules, from later garbage collections.

    This also holds in processes that the fork server forks from this process.
    """
    if not gc.get_freeze_count():
        gc.freeze()


@contextmanager
def held_off() -> Iterator[None]:
    """Disables automatic garbage collection inside the context."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Collector(Hook):
    def on_save(self, done: int, due: Due) -> None:
        """Collects young objects every EVERY steps, and all objects after a save or an evaluation, when training has stopped
        anyway."""
        if due.saves or due.evaluates:
            gc.collect()
        elif done % EVERY == 0:
            gc.collect(1)
