"""Reads the record of a run's training from its folder: segments (data plans), receipts, and the links of their hash chain.

Receipts may overlap if a run was resumed from an older checkpoint. If the run went back to an earlier step and changed the data
from there, the checkpoints after that step are left out.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NotRequired

from typing_extensions import TypedDict

from heliostat.checkpoint import layout
from heliostat.data import receipt
from heliostat.errors import CheckpointError, ConfigError, VerifyError
from heliostat.runs import segments
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Hex, Whole, open_

READERS = 8


@open_
class SealedReceipt(TypedDict):
    """Describes the content of a receipt file, as `data.receipt` writes it."""

    first: Whole
    steps: list[Hex]
    chain: Hex
    data_digest: str
    version: NotRequired[Whole]


SEALED = Format(SealedReceipt, "receipt", VerifyError)


@dataclass(frozen=True)
class ReceiptFile:
    """Holds one receipt file: the digests of the steps [first, end), the version of `data.receipt`, and the hash chain after
    these steps."""

    where: str
    first: int
    steps: list[str]
    chain: str
    data_digest: str
    version: int

    @property
    def end(self) -> int:
        return self.first + len(self.steps)


@dataclass(frozen=True)
class Link:
    """Holds the hash chain after `end` steps, as a receipt or a checkpoint recorded it."""

    where: str
    end: int
    chain: str


class History:
    """Holds the record of a run's training. Raises ConfigError if the run's folder has no segments or no receipts.

    `plans` and `receipts` are ordered by their first step. `links` are grouped by `end`. `steps` is the largest `end` of a
    link.
    """

    def __init__(self, run: Location) -> None:
        self.plans = segments.read(run)
        if not self.plans:
            raise ConfigError(
                f"{run}: has no record of its data ({run_folder.SEGMENTS}/ is missing). "
                "An older version of heliostat may have made this run"
            )
        self.receipts = receipts(run)
        self.links: dict[int, list[Link]] = {}
        for link in [*(Link(r.where, r.end, r.chain) for r in self.receipts), *self._checkpoints(run)]:
            self.links.setdefault(link.end, []).append(link)
        if not self.links:
            raise ConfigError(
                f"{run}: has no receipts yet. heliostat writes the first receipt with the first checkpoint. "
                "Try again after that checkpoint"
            )
        self.steps = max(self.links)

    def version(self, step: int) -> int:
        """Returns the version of `receipt` by which a step's digest entered the chain.

        This is the version of the last receipt whose first step isn't after this step.
        """
        at = max(0, bisect.bisect_right(self.receipts, step, key=lambda r: r.first) - 1)
        return self.receipts[at].version if self.receipts else receipt.VERSION

    def segment(self, step: int) -> int:
        """Returns the index of the segment that contains a step."""
        return max(i for i, plan in enumerate(self.plans) if plan.begins <= step)

    def _checkpoints(self, run: Location) -> Iterator[Link]:
        for step in layout.steps(run):
            try:
                index = layout.open_checkpoint(run, step).index
            except CheckpointError:
                continue  # the checkpoint is missing or incomplete
            said = index.receipt
            if index.data_digest not in {p.digest for p in self.plans[: self.segment(said.steps - 1)]}:
                yield Link(f"checkpoint {step}", said.steps, said.chain)


def receipts(run: Location) -> list[ReceiptFile]:
    """Reads every receipt of a run, ordered by first step. Raises VerifyError for a receipt of a newer version, or with a wrong
    file name."""
    folder = run.join(run_folder.RECEIPTS)

    def read(name: str) -> ReceiptFile:
        raw = SEALED.read(folder.join(name))
        sealed = ReceiptFile(name, raw["first"], raw["steps"], raw["chain"], raw["data_digest"], raw.get("version", 1))
        if sealed.version not in receipt.CONTENTS:
            raise VerifyError(
                f"{folder.join(name)}: has version {sealed.version}, from a newer heliostat. Verify the run with that heliostat"
            )
        if sealed.end != run_folder.step_of(name):
            raise VerifyError(
                f"{folder.join(name)}: ends at step {sealed.end}, but the file's name has another step. Restore the original file"
            )
        return sealed

    with ThreadPoolExecutor(READERS) as pool:
        return sorted(pool.map(read, [name for name, _ in folder.files()]), key=lambda r: r.first)
