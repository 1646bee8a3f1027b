"""Shards training state within groups of workers (`train.zero.shard_group_size`) at ZeRO stage 3. Each group has all of the
state.

Ranks [0, n) are the first group, [n, 2n) the second, and so on. DeepSpeed sees only one group: DeepSpeed gathers and reduces
within this group, after every micro-batch. Before each optimizer step, the workers with the same part of the state average the
gradients of that part over all groups. So all groups make the same step. Other names for this method are hybrid sharding and HSDP
(Zhang et al. 2022, arXiv 2205.00119).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from heliostat.engine import patches, zero_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class StateGroup:
    """Contains the groups of a worker. DeepSpeed calls the `get_...` methods to find its workers."""

    def __init__(self, workers: int) -> None:
        """Forms the groups of `workers` workers each, and the groups of workers with the same part of the state. Collective."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self.number, self.part = divmod(rank, workers)
        self.count, self.workers = world // workers, workers
        self.within = [dist.new_group(list(range(i, i + workers))) for i in range(0, world, workers)][self.number]
        self.across = [dist.new_group(list(range(i, world, workers))) for i in range(workers)][self.part]

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.within

    def get_data_parallel_world_size(self) -> int:
        return self.workers

    def get_data_parallel_rank(self) -> int:
        return self.part

    def get_model_parallel_group(self) -> None:
        """Returns None, because DeepSpeed doesn't split the model itself over workers here."""

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def dividing(self) -> AbstractContextManager[None]:
        """Opens a context in which `deepspeed.zero.Init` partitions models over the workers of the group."""
        return patches.partition_within(self.within)

    def equalize(self, model: torch.nn.Module) -> None:
        """Gives all groups the first group's weights, because a worker may have drawn or read some values only for its own
        group."""
        from deepspeed.accelerator import get_accelerator

        first, device = dist.get_global_rank(self.across, 0), get_accelerator().current_device_name()
        for values in map(zero_state.part, model.parameters()):
            sent = values.reshape(-1).to(device)
            dist.broadcast(sent.view(torch.uint8), first, group=self.across)
            values.copy_(sent.view_as(values))

    def average(self, engine: DeepSpeedEngine) -> None:
        """Makes the engine's optimizer average the gradients over the groups before each step.

        The groups check the averaged fp16 gradients for overflow together. So either all groups make a step, or no group does.
        """
        first = dist.get_global_rank(self.across, 0)
        patches.before_step(
            engine.optimizer,
            average=lambda gradients: dist.all_reduce(gradients.div_(self.count), group=self.across),
            equalize=lambda norm: dist.broadcast(norm, first, group=self.across),
            agree=lambda flag: dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.across),
        )
