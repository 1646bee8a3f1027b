"""Holds which samples a run was trained on since its last receipt, until the next one seals them.

    unsealed.add(step, samples)          # behind every step
    part = unsealed.part(done)           # what the next receipt covers
    unsealed.write(part, group)          # before the checkpoint of these steps, in any thread: collective
    unsealed.drop(part)                  # in the thread that trains, as soon as all workers know that it is written
    unsealed.kept() -> unsealed.take_up  # with a copy of the training state, of all workers, and back

A receipt tells the digests of its steps' samples, and a chain of all digests up to there (`data.receipt`). Beside it lies a list
of samples that were replaced (`bad_samples`). If a receipt can't be written, the next one covers its steps, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from heliostat.checkpoint import agreement
from heliostat.data import receipt
from heliostat.data.dataset import Dataset
from heliostat.data.stream import StepSamples
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.training.worker import bad_samples


class SealedSteps(NamedTuple):
    """Describes a receipt that is written: the chain after it, and how many samples were replaced in the run up to there."""

    chain: str
    replaced: int


@dataclass
class UnsealedPart:
    """Holds this worker's share of what one receipt covers: the steps since the last one, up to step `done`. `sealed`: once the
    receipt is written, the same on all workers."""

    done: int
    chain: str
    digests: list[str]  # on rank 0: of steps that an earlier attempt made
    steps: int  # of this attempt, on a worker that reads samples
    lanes: list[np.ndarray]  # their digests
    bad: list[dict[str, Any]]
    replaced: int
    sealed: SealedSteps | None = None


class Unsealed:
    """Holds the chain up to the last receipt, and since then the steps' digests and the replaced samples.

    `replaced`: samples replaced so far in the run, on this worker; what earlier attempts replaced is rank 0's. `group`: of all
    workers, on the CPU; `reads`: whether this worker reads samples itself, or another does that shares them with it.
    """

    def __init__(self, folder: Location, dataset: Dataset, group: Any, reads: bool = True) -> None:
        self.folder, self.dataset, self.group, self.reads = folder, dataset, group, reads
        self.chain, self.replaced = receipt.GENESIS, 0
        self._digests: list[str] = []  # on rank 0: of steps that an earlier attempt made
        self._lanes: list[list[int]] = []  # of this attempt's
        self._bad: list[dict[str, Any]] = []

    def add(self, step: int, mine: StepSamples) -> None:
        """Notes this worker's share of a step, counted from 0."""
        if self.reads:
            self._lanes.append(mine.digests)
            self._bad += [{"step": step, **dataclasses.asdict(bad)} for bad in mine.bad]
            self.replaced += len(mine.bad)

    def part(self, done: int) -> UnsealedPart:
        """Returns what a receipt up to step `done` covers; steps that are added later don't change it."""
        return UnsealedPart(done, self.chain, list(self._digests), len(self._lanes), self._own(), list(self._bad), self.replaced)

    def write(self, part: UnsealedPart, group: Any, first: Callable[[], None] = lambda: None) -> SealedSteps:
        """Writes the receipt of a part, and the list of replaced samples. Collective, and in any thread.

        `first`: what rank 0 does before; if it raises, nothing is written, and all workers raise.
        """
        found = agreement.merged(group, lambda: (part.lanes, part.bad, part.replaced), _join)

        def written() -> tuple[str, int]:
            lanes, bad, replaced = found or ([], [], 0)
            digests = part.digests + _of_steps(lanes)
            chain = receipt.extend(part.chain, digests)
            first()
            sealed = receipt.seal(part.done - len(digests), digests, chain, self.dataset.plan.digest)
            run_folder.receipt(self.folder, part.done).write(sealed)
            bad_samples.write(self.folder, part.done, bad, self.dataset)
            return chain, replaced

        part.sealed = SealedSteps(*agreement.first(group, written))
        return part.sealed

    def drop(self, part: UnsealedPart) -> None:
        """Forgets what a receipt covers, if it was written."""
        if part.sealed:
            self.chain = part.sealed.chain
            del self._digests[: len(part.digests)], self._lanes[: part.steps], self._bad[: len(part.bad)]

    def seal(self, done: int) -> int:
        """Writes the receipt of the steps up to `done`, and waits for it; returns how many samples were replaced in the run.
        Collective."""
        part = self.part(done)
        sealed = self.write(part, self.group)
        self.drop(part)
        return sealed.replaced

    def kept(self) -> dict[str, Any]:
        """Returns what it holds as plain data."""
        held = {"chain": self.chain, "digests": list(self._digests), "lanes": self._own()}
        return {**held, "bad": list(self._bad), "bad_samples": self.replaced}

    def take_up(self, kept: list[dict[str, Any]]) -> None:
        """Goes on, on rank 0, from what all workers of another attempt held, in the order of their ranks."""
        self.chain = kept[0]["chain"]
        self._digests = kept[0]["digests"] + _of_steps([lanes for one in kept for lanes in one["lanes"]])
        self._bad = [bad for one in kept for bad in one["bad"]]
        self.replaced = sum(one["bad_samples"] for one in kept)

    def _own(self) -> list[np.ndarray]:
        """Returns the digests of this worker's lanes, [steps, lanes]: a list of one, to be joined, or of none."""
        return [np.array(self._lanes, dtype=np.int64)] if self.reads else []


def _of_steps(lanes: list[np.ndarray]) -> list[str]:
    """Computes the digests of steps from all workers' lanes; there may be no steps."""
    return receipt.step_digests(receipt.in_lane_order(lanes)) if lanes and len(lanes[0]) else []


def _join(one: tuple[list[Any], list[Any], int], other: tuple[list[Any], list[Any], int]) -> tuple[list[Any], list[Any], int]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]
