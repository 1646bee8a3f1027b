"""Holds which samples a run was trained on since its last receipt, until the next one seals them.

    unsealed.add(step, samples)          # behind every step
    unsealed.seal(done)                  # before the checkpoint of these steps: collective
    unsealed.kept() -> unsealed.take_up  # with a copy of the training state, of all workers, and back

A receipt tells the digests of its steps' samples, and a chain of all digests up to there (`data.receipt`). Beside it lies a list
of samples that were replaced (`bad_samples`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from heliostat.checkpoint import agreement
from heliostat.data import receipt
from heliostat.data.dataset import Dataset
from heliostat.data.stream import StepSamples
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.training.worker import bad_samples


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

    def seal(self, done: int, first: Callable[[], None] = lambda: None) -> int:
        """Writes the receipt of the steps since the last one, up to step `done`; returns how many samples were replaced in the
        run, on rank 0. Collective. `first`: what rank 0 does before; if it raises, nothing is written, and all workers raise."""
        parts = agreement.merged(self.group, self._own, operator.add)  # on rank 0

        def write() -> str:
            digests = self._digests + _of_steps(parts or [])
            chain = receipt.extend(self.chain, digests)
            first()
            sealed = receipt.seal(done - len(digests), digests, chain, self.dataset.plan.digest)
            run_folder.receipt(self.folder, done).write(sealed)
            return chain

        self.chain = agreement.first(self.group, write)
        replaced = bad_samples.collect(self.folder, done, self._bad, self.replaced, self.dataset, self.group)
        self._digests, self._lanes, self._bad = [], [], []
        return replaced

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
