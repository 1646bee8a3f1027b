"""Keeps Python's garbage collector off the step path.

Left to itself it runs when so many objects have been made, on each worker within another step, and all others wait for that
worker in the next collective. Here it runs between steps, at the same ones on all workers: after every EVERY-th it looks at
what is new, and after evaluations and saves at everything.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from heliostat.training.worker.context import Due, Hook

EVERY = 10  # steps; garbage in circles can hold a step's tensors, so they are not left for long


def spare_imports() -> None:
    """Exempts what has been imported so far from all later collections; forks of the fork server come with that done."""
    if not gc.get_freeze_count():
        gc.freeze()


@contextmanager
def held_off() -> Iterator[None]:
    """Keeps the collector from running by itself inside."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Collector(Hook):
    def on_save(self, done: int, due: Due) -> None:
        """Collects what is new every EVERY steps, and everything where training has stopped anyway."""
        if due.saves or due.evaluates:
            gc.collect()
        elif done % EVERY == 0:
            gc.collect(1)
