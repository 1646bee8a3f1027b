"""Computes the bytes of weights and gradients that workers send in an optimizer step, and which workers exchange these bytes. The
functions are pure.

All bytes travel in rings. A ring consists of all workers, of the workers of a group (`train.zero.shard_group_size`,
`hpz_partition_size`), or of the workers in different groups that have the same shard. In the last case there is one ring per
shard, and all these rings run at the same time. A group consists of neighboring ranks. So a group that is as large as a node,
or a fraction of a node, is in one node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from heliostat.config.train_section import Zero
from heliostat.plan.hardware import Device

EIGHT_BITS = 1  # bytes per weight; ignores the scales, which have 4 bytes per thousands of weights


@dataclass(frozen=True)
class Traffic:
    """Holds the bytes that each worker sends in a step.

    `around`: bytes in a ring of all `workers`. With tensor parallelism, `around` is for one of `rings` rings, which share a
    node's links to other nodes. `inside`: bytes in the worker's `group`. `across`: bytes across groups, sent once, before the
    optimizer's step. `calls`: number of collectives that go around the ring of all workers.
    """

    around: int
    workers: int
    inside: int = 0
    across: int = 0
    group: int = 1
    rings: int = 1
    calls: int = 0

    @property
    def total(self) -> int:
        return self.around + self.inside + self.across

    def __add__(self, other: int) -> Traffic:
        return replace(self, around=self.around + other)

    def between_nodes(self, per_node: int) -> int:
        """Computes the bytes that each node sends to other nodes in a step. `per_node`: workers per node. Each ring has one link
        out of a node."""
        if self.workers <= per_node:
            return 0
        return self.around * self.rings + (self.inside if self.group > per_node else 0) + self.across * min(self.group, per_node)

    def seconds(self, device: Device) -> tuple[float, float]:
        """Estimates the seconds of communication at the links' peak rates. Returns two numbers: during the forward and backward
        passes, and after these passes."""
        during = self.around / rate(self.workers, device, self.rings) + self.inside / rate(self.group, device)
        if self.workers <= device.per_node:
            return during, self.across / device.link
        return during, self.across / min(device.link, device.network / min(self.group, device.per_node))


def rate(workers: int, device: Device, rings: int = 1) -> float:
    """Returns the peak rate, in bytes per second, between `workers` workers. If these workers fit on one node, returns the rate
    of a link. Otherwise, returns the rate of each of `rings` rings between nodes."""
    return device.link if workers <= device.per_node else min(device.link, device.network / rings)


def volume(numel: int, low: int, workers: int, stage: int, accumulation: int, frozen: int = 0) -> int:
    """Computes the bytes that each worker sends in an optimizer step with ring collectives. Each worker receives the same
    number of bytes.

    With Psi parameters, an all-reduce moves 2 Psi elements, and a reduce-scatter or an all-gather moves Psi (Rajbhandari et al.
    2020, section 7). Stages 0 and 1 reduce once per step. Stage 2 reduces after every micro-batch, because each worker keeps
    only its shard of the gradients. Stage 3 gathers the weights twice and reduces once in every micro-batch.

    `numel`: number of trained parameters. `frozen`: number of the other parameters, which only stage 3 shards and gathers.
    """
    times = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[stage]
    gathers = 2 * accumulation if stage == 3 else 0
    return int((times * numel + gathers * frozen) * low * (workers - 1) / workers)


def calls(stage: int, accumulation: int, layers: int, buckets: int, copied: bool = False) -> int:
    """Counts the collectives of an optimizer step. Stage 3 gathers and reduces layer by layer, the other stages bucket by
    bucket.

    `layers`: the number of layers, plus one for everything outside the layers. `copied`: whether stage 3 has secondary copies.
    With secondary copies, only the first gather of a step goes around all workers.
    """
    if stage == 3:
        return layers * (1 + accumulation if copied else 3 * accumulation)
    return buckets * (accumulation + 1 if stage == 2 else 2)


def of(zero: Zero, stage: int, numel: int, low: int, summed: int, workers: int, accumulation: int, frozen: int = 0) -> Traffic:
    """Computes the traffic of a step. `low`: bytes per weight. `summed`: bytes per gradient that is summed over micro-batches.
    `numel` and `frozen`: numbers of trained and of other parameters."""
    if stage == 3 and zero.shard_group_size and zero.shard_group_size < workers:
        group = zero.shard_group_size
        copies, part = workers // group, -(-numel // group)
        inside = volume(numel, low, group, 3, accumulation, frozen)
        return Traffic(0, workers, inside, int(2 * part * summed * (copies - 1) / copies), group)
    gathered = EIGHT_BITS if stage == 3 and zero.quantize_weights else low
    if stage == 3 and zero.hpz_partition_size:
        group = min(zero.hpz_partition_size, workers)
        ring, again = (workers - 1) / workers, (numel + frozen) * (group - 1) / group
        around = int(ring * ((numel + frozen) * gathered + numel * low * accumulation))  # the first gather, and all reductions
        return Traffic(around, workers, int(again * gathered * (2 * accumulation - 1)), 0, group)
    plain = volume(numel, low, workers, stage, accumulation, frozen)
    saved = volume(0, low - gathered, workers, 3, accumulation, numel + frozen)  # by gathers of quantized weights
    return Traffic(plain - saved, workers)
