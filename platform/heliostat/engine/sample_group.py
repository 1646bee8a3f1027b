"""Forms groups of workers that compute each sample together. With `train.parallel.sequence`, each worker has a range of the
sample's tokens. With `train.parallel.tensor`, each worker has all tokens and a part of each matrix.

Ranks [0, n) are the first replica, [n, 2n) the second, and so on. The virtual ranks are divided among the replicas. A replica's
first worker reads the samples for the complete replica. With one worker per replica, this module has no effect.
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
    """Describes a worker's position in its replica. `counts`: whether global sums over samples include this worker's sums.
    `averaged`: the number of workers over which gradients are averaged."""

    def __init__(self, parallel: Parallel = ALONE) -> None:
        """Forms the process groups of the replicas. Collective."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self.workers, self.cuts = parallel.sharing, parallel.sequence > 1
        self.replica, self.member = divmod(rank, self.workers)
        self.replicas = world // self.workers
        self.part = self.member if self.cuts else 0  # workers that compute complete samples draw the same random numbers
        self.counts = self.cuts or self.reads
        self.averaged = world if self.cuts else self.replicas
        self.group: dist.ProcessGroup | None = None
        self._control: dist.ProcessGroup | None = None
        if self.workers > 1:
            ranks = [list(range(start, start + self.workers)) for start in range(0, world, self.workers)]
            if self.cuts:
                self.group = [dist.new_group(some) for some in ranks][self.replica]  # with the backend of the training
            self._control = [dist.new_group(some, backend="gloo") for some in ranks][self.replica]

    @property
    def reads(self) -> bool:
        """Returns whether this worker reads and records the samples of its replica: true for the replica's first worker."""
        return self.member == 0

    def share(self, work: Callable[[], T]) -> T:
        """Runs `work` on the replica's first worker. On all workers of the replica, returns the result of `work`, or raises the
        error of `work`."""
        return first(self._control, work) if self._control else work()

    def cut(self, recipe: Recipe, batch: Batch) -> Batch:
        """Cuts this worker's range of tokens out of each sample of a batch. Without sequence parallelism, returns the batch
        itself."""
        if not self.cuts:
            return batch
        assert isinstance(recipe, CutsSamples)
        return recipe.cut(batch, self.part, self.workers)

    def join(self, recipe: Recipe, model: torch.nn.Module) -> None:
        """Makes the model exchange the data that this worker's tokens need from other workers' tokens."""
        if self.group:
            assert isinstance(recipe, CutsSamples)
            with sequence_attention.exchanging(exchange_heads):
                recipe.exchange(model, self.group)


def exchange_heads(
    attention: Core, group: dist.ProcessGroup, micro_batch_size: int, sizes: tuple[int, int, int], layers: int
) -> Core:
    """Wraps an attention with DeepSpeed's Ulysses. The wrapper's inputs are some tokens of all heads. The wrapper calls
    `attention` with all tokens of some heads. `sizes`: from `sequence_attention.sizes`."""
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
