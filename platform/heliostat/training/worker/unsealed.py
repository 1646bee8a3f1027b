"""Records the samples that a run has trained on since its last receipt, until the next receipt contains them.

    unsealed.add(step, samples)          # after every step
    part = unsealed.part(done)           # the contents of the next receipt
    unsealed.write(part, group)          # before the checkpoint of these steps, in any thread: collective
    unsealed.drop(part)                  # in the training thread, once all workers know that the receipt is written
    unsealed.take_up(parts)              # from the in-memory checkpoints of all workers

A receipt holds the digests of its steps' samples, and a chain of all digests so far (`data.receipt`). If a receipt can't be
written, the next one covers its steps, too.

`quarantine/step-00000100.jsonl` in the run's folder lists the samples replaced in the steps of the receipt with the same name.
Each entry has the step, dataset, shard, row group, row, and reason, and the replacement's shard, row group, and row. If no sample
was replaced, there is no file. Steps count from 1. Older lists don't have the field `counted_from`, and their steps count from 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from heliostat.checkpoint import agreement
from heliostat.checkpoint.agreement import Group
from heliostat.config.spec import Job
from heliostat.data import receipt
from heliostat.data.dataset import Bad, Dataset
from heliostat.data.order import Order
from heliostat.data.stream import StepSamples
from heliostat.errors import DataError
from heliostat.runs.consumed import ConsumedPlace, Replaced
from heliostat.storage import run_folder, wire
from heliostat.storage.locations import Location

BadOfStep = tuple[int, Bad]  # the step, counted from 0, and the sample
Share = tuple[list[np.ndarray], list[BadOfStep], int]  # of some workers: digests, replaced samples, their number in the run


@wire.travels
class SealedSteps(NamedTuple):
    """Describes a written receipt: the chain after it, and the number of samples replaced in the run so far."""

    chain: str
    replaced: int


@wire.travels
@dataclass
class UnsealedPart:
    """Holds this worker's share of one receipt: the steps since the last receipt, up to step `done`.

    `sealed`: set once the receipt is written; all workers have the same value.
    """

    done: int
    chain: str
    digests: list[str]  # on rank 0: step digests from an earlier attempt
    steps: int  # number of steps of this attempt, on a worker that reads samples
    lanes: list[np.ndarray]  # digests of these steps, int64 [steps, virtual ranks]
    bad: list[BadOfStep]
    replaced: int
    sealed: SealedSteps | None = None


class Unsealed:
    """Holds the chain up to the last receipt, and the digests and replaced samples of the steps since then.

    `replaced`: the number of samples that this worker has replaced in the run; on rank 0, the number includes earlier attempts.
    `group`: a CPU group of all workers. `reads`: false if another worker reads this worker's samples and shares them.
    """

    def __init__(self, folder: Location, dataset: Dataset, group: dist.ProcessGroup, reads: bool = True) -> None:
        self.folder, self.dataset, self.group, self.reads = folder, dataset, group, reads
        self.chain, self.replaced = receipt.GENESIS, 0
        self._digests: list[str] = []  # on rank 0: step digests from an earlier attempt
        self._lanes: list[list[int]] = []  # by step of this attempt: a digest per virtual rank
        self._bad: list[BadOfStep] = []

    def add(self, step: int, mine: StepSamples) -> None:
        """Records this worker's share of a step, counted from 0."""
        if self.reads:
            self._lanes.append(mine.digests)
            self._bad += [(step, bad) for bad in mine.bad]
            self.replaced += len(mine.bad)

    def part(self, done: int) -> UnsealedPart:
        """Returns the contents of a receipt up to step `done`. Later steps don't change the returned contents."""
        return UnsealedPart(done, self.chain, list(self._digests), len(self._lanes), self._own(), list(self._bad), self.replaced)

    def write(self, part: UnsealedPart, group: Group, first: Callable[[], None] = lambda: None) -> SealedSteps:
        """Writes the receipt of a part, and the list of replaced samples. All workers call this method together, in any thread.

        Rank 0 calls `first` before it writes. If `first` raises, nothing is written, and all workers raise.
        """
        shares = agreement.merged(group, lambda: (part.lanes, part.bad, part.replaced), _join)

        def written() -> tuple[str, int]:
            lanes, bad, replaced = shares or ([], [], 0)
            digests = part.digests + _of_steps(lanes)
            chain = receipt.extend(part.chain, digests)
            first()
            sealed = receipt.seal(part.done - len(digests), digests, chain, self.dataset.plan.digest)
            run_folder.receipt(self.folder, part.done).write(sealed)
            write_list(self.folder, part.done, bad, self.dataset)
            return chain, replaced

        part.sealed = SealedSteps(*agreement.first(group, written))
        return part.sealed

    def drop(self, part: UnsealedPart) -> None:
        """Forgets the steps of a part if its receipt was written."""
        if part.sealed:
            self.chain = part.sealed.chain
            del self._digests[: len(part.digests)], self._lanes[: part.steps], self._bad[: len(part.bad)]

    def seal(self, done: int) -> int:
        """Writes the receipt of the steps up to `done`, and waits until the receipt is written.

        Returns the number of samples replaced in the run. All workers call this method together.
        """
        part = self.part(done)
        sealed = self.write(part, self.group)
        self.drop(part)
        return sealed.replaced

    def take_up(self, parts: list[UnsealedPart]) -> None:
        """Takes over, on rank 0, the records that the workers of another attempt kept for the receipt. `parts`: in rank order."""
        self.chain = parts[0].chain
        self._digests = parts[0].digests + _of_steps([lanes for part in parts for lanes in part.lanes])
        self._bad = [bad for part in parts for bad in part.bad]
        self.replaced = sum(part.replaced for part in parts)

    def _own(self) -> list[np.ndarray]:
        """Returns this worker's digests, int64 [steps, virtual ranks], in a list of one; an empty list if this worker doesn't
        read samples.
        """
        return [np.array(self._lanes, dtype=np.int64)] if self.reads else []


def _of_steps(lanes: list[np.ndarray]) -> list[str]:
    """Computes the digests of steps from the digests of all workers' virtual ranks. The list of steps may be empty."""
    return receipt.step_digests(receipt.in_lane_order(lanes)) if lanes and len(lanes[0]) else []


def _join(one: Share, other: Share) -> Share:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def check_budget(bad: int, steps: int, job: Job, order: Order) -> None:
    """Checks the number of replaced samples against the job's budget.

    Raises DataError if `bad` is more than `data.max_bad_fraction` of an epoch's samples or of all trained samples, whichever
    number is larger.
    """
    base = max(int(order.epoch_samples.sum()), steps * job.train.global_batch_size)
    allowed = job.data.max_bad_fraction * base
    if bad > allowed:
        raise DataError(
            f"data.max_bad_fraction: replaced {bad} bad samples by step {steps}, more than "
            f"{job.data.max_bad_fraction:g} of {base:,} samples. Look at the shards that the warnings name, prepare the "
            f"dataset again, or raise data.max_bad_fraction"
        )


def write_list(run: Location, done: int, replaced: list[BadOfStep], dataset: Dataset) -> None:
    """Writes the list of samples that all workers have replaced since the last receipt. Writes no file if no sample was
    replaced."""
    if replaced:
        lines = [json.dumps(describe(step, bad, dataset)) for step, bad in sorted(replaced, key=lambda b: (b[0], b[1].position))]
        run_folder.quarantine(run, done).write("\n".join(lines).encode() + b"\n")


def describe(step: int, bad: Bad, dataset: Dataset) -> Replaced:
    """Describes a replaced sample of a step, counted from 0, as an entry of the list. The entry has names instead of indices."""

    def place(source: int, chunk: int, row: int) -> ConsumedPlace:
        chunks = dataset.sources[source].chunks
        return {
            "dataset": dataset.plan.uris[source],
            "shard": chunks["path"][chunk].as_py(),
            "row_group": chunks["row_group"][chunk].as_py(),
            "row": row,
        }

    where = place(bad.source, bad.chunk, bad.row)
    return {"step": step + 1, "counted_from": 1, **where, "reason": bad.reason, "replaced_by": place(*bad.by)}
