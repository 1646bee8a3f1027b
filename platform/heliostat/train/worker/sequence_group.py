"""Places a worker among those that share samples, a stretch of tokens each (`train.parallel.sequence`).

Ranks [0, n) are the first replica, [n, 2n) the second, ...: lanes are dealt to replicas, and a replica's first worker reads for
all of it. With one worker in each replica nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from heliostat.checkpoint.agreement import first
from heliostat.recipes.protocol import Batch, CutsSamples, Recipe

T = TypeVar("T")


class SequenceGroup:
    def __init__(self, workers: int) -> None:
        """Forms the groups of so many workers; collective."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self.workers = workers
        self.replica, self.part = divmod(rank, workers)
        self.replicas = world // workers
        self.group: Any = None
        self._control: Any = None
        if workers > 1:
            ranks = [list(range(start, start + workers)) for start in range(0, world, workers)]
            self.group = [dist.new_group(some) for some in ranks][self.replica]  # of the training's backend
            self._control = [dist.new_group(some, backend="gloo") for some in ranks][self.replica]

    @property
    def reads(self) -> bool:
        """Tells whether this worker reads its replica's samples, and accounts for them."""
        return self.part == 0

    def share(self, work: Callable[[], T]) -> T:
        """Does the work on the replica's first worker; returns the result, or raises the error, on all of it."""
        return first(self._control, work) if self.workers > 1 else work()

    def cut(self, recipe: Recipe, batch: Batch) -> Batch:
        """Cuts this worker's stretch of a batch."""
        if self.workers == 1:
            return batch
        assert isinstance(recipe, CutsSamples)
        return recipe.cut(batch, self.part, self.workers)

    def join(self, recipe: Recipe, model: Any) -> None:
        """Makes the model exchange what its tokens need of the other stretches."""
        if self.workers > 1:
            assert isinstance(recipe, CutsSamples)
            recipe.exchange(model, self.group)
