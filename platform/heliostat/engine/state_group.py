"""Divides training state within groups of workers (`train.zero.shard_group_size`), each of which has all of it, at ZeRO stage 3.

Ranks [0, n) are the first group, [n, 2n) the second, ... To DeepSpeed a group is all workers there are: it gathers and reduces
within, after every micro-batch. Before the optimizer's step the workers of all groups that have the same part average its
gradients, once a step, and so make the same step. (Elsewhere: hybrid sharding, HSDP; Zhang et al. 2022, arXiv 2205.00119.)
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
    """Places a worker in its group. The methods with long names are those by which DeepSpeed asks for its workers."""

    def __init__(self, workers: int) -> None:
        """Forms the groups of so many workers each, and those of the workers with the same part; collective."""
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
        """Returns no group: every worker has models of its own."""

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def dividing(self) -> AbstractContextManager[None]:
        """Makes what is built inside, through `deepspeed.zero.Init`, divided within the group."""
        return patches.partition_within(self.within)

    def equalize(self, model: torch.nn.Module) -> None:
        """Gives all groups the first one's weights: of what is built in parts, one worker may draw or read the values."""
        from deepspeed.accelerator import get_accelerator

        first, device = dist.get_global_rank(self.across, 0), get_accelerator().current_device_name()
        for values in map(zero_state.part, model.parameters()):
            sent = values.reshape(-1).to(device)
            dist.broadcast(sent.view(torch.uint8), first, group=self.across)
            values.copy_(sent.view_as(values))

    def average(self, engine: DeepSpeedEngine) -> None:
        """Makes the engine's optimizer average the gradients over the groups before it makes a step of them.

        All groups make the step or none does: whether fp16 gradients overflow is decided of the averages, and by all.
        """
        first = dist.get_global_rank(self.across, 0)
        patches.before_step(
            engine.optimizer,
            average=lambda gradients: dist.all_reduce(gradients.div_(self.count), group=self.across),
            equalize=lambda norm: dist.broadcast(norm, first, group=self.across),
            agree=lambda flag: dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.across),
        )
