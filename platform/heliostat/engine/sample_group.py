"""Places a worker among those that compute each sample together: a stretch of its tokens each (`train.parallel.sequence`), or all
of its tokens with a part of each matrix (`train.parallel.tensor`).

Ranks [0, n) are the first replica, [n, 2n) the second, ...: lanes are dealt to replicas, and a replica's first worker reads for
all of it. With one worker in each replica nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from heliostat.checkpoint.agreement import first
from heliostat.config.train_section import Parallel
from heliostat.parallel import sequence_attention
from heliostat.parallel.document_attention import Core
from heliostat.recipes.protocol import Batch, CutsSamples, Recipe

T = TypeVar("T")
ALONE = Parallel()


class SampleGroup:
    """Holds a worker's place. `counts`: whether what it sums over its samples is to be added to the sums of others; `averaged`:
    over how many workers gradients are averaged."""

    def __init__(self, parallel: Parallel = ALONE) -> None:
        """Forms the groups of so many workers; collective."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self.workers, self.cuts = parallel.sharing, parallel.sequence > 1
        self.replica, self.member = divmod(rank, self.workers)
        self.replicas = world // self.workers
        self.part = self.member if self.cuts else 0  # of each sample; workers that compute all of it draw the same numbers
        self.counts = self.cuts or self.reads
        self.averaged = world if self.cuts else self.replicas
        self.group: dist.ProcessGroup | None = None
        self._control: dist.ProcessGroup | None = None
        if self.workers > 1:
            ranks = [list(range(start, start + self.workers)) for start in range(0, world, self.workers)]
            if self.cuts:
                self.group = [dist.new_group(some) for some in ranks][self.replica]  # of the training's backend
            self._control = [dist.new_group(some, backend="gloo") for some in ranks][self.replica]

    @property
    def reads(self) -> bool:
        """Tells whether this worker reads its replica's samples, and accounts for them."""
        return self.member == 0

    def share(self, work: Callable[[], T]) -> T:
        """Does the work on the replica's first worker; returns the result, or raises the error, on all of it."""
        return first(self._control, work) if self._control else work()

    def cut(self, recipe: Recipe, batch: Batch) -> Batch:
        """Cuts this worker's stretch of a batch."""
        if not self.cuts:
            return batch
        assert isinstance(recipe, CutsSamples)
        return recipe.cut(batch, self.part, self.workers)

    def join(self, recipe: Recipe, model: torch.nn.Module) -> None:
        """Makes the model exchange what its tokens need of the other stretches."""
        if self.group:
            assert isinstance(recipe, CutsSamples)
            with sequence_attention.exchanging(exchange_heads):
                recipe.exchange(model, self.group)


def exchange_heads(
    attention: Core, group: dist.ProcessGroup, micro_batch_size: int, sizes: tuple[int, int, int], layers: int
) -> Core:
    """Makes an attention of all tokens for some heads out of one of some tokens for all heads, by DeepSpeed's Ulysses; `sizes` as
    `sequence_attention.sizes` returns them."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    heads, shared, width = sizes
    return UlyssesSPAttentionHF(
        attn=attention,
        batch_size=micro_batch_size,
        attn_head_count=heads,
        attn_head_size=width,
        kv_head_count=shared,
        num_hidden_layers=layers,
        process_group=group,
        seq_length_is_variable=True,
    )
