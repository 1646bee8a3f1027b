"""What a run's folder says was trained: its segments (data plans), its receipts, and the links of their chain.

Receipts may overlap where a run was resumed from an older checkpoint. A checkpoint of steps that were trained before the data
was changed, at a step before them, is of an undone future and left out.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NotRequired

from typing_extensions import TypedDict

from heliostat import run_folder
from heliostat.checkpoint import layout
from heliostat.data import receipt
from heliostat.errors import CheckpointError, ConfigError, VerifyError
from heliostat.records import Format, Hex, Whole, open_
from heliostat.runs import segments
from heliostat.storage import Location

READERS = 8


@open_
class Sealed(TypedDict):
    """What `data.receipt` writes."""

    first: Whole
    steps: list[Hex]
    chain: Hex
    data_digest: str
    version: NotRequired[Whole]


SEALED = Format(Sealed, "receipt", VerifyError)


@dataclass(frozen=True)
class Receipt:
    """One receipt file: the digests of steps [first, end), of a version of `receipt`, and the chain after them."""

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
    """What a receipt or a checkpoint says the chain is after `end` steps."""

    where: str
    end: int
    chain: str


class History:
    """`plans` by the step at which they begin, `receipts` by first step, `links` by end; `steps`: up to where any reach."""

    def __init__(self, run: Location) -> None:
        self.plans = segments.read(run)
        if not self.plans:
            raise ConfigError(
                f"{run}: does not say what data it follows ({run_folder.SEGMENTS}/ is missing); was it made by an older version?"
            )
        self.receipts = receipts(run)
        self.links: dict[int, list[Link]] = {}
        for link in [*(Link(r.where, r.end, r.chain) for r in self.receipts), *self._checkpoints(run)]:
            self.links.setdefault(link.end, []).append(link)
        if not self.links:
            raise ConfigError(f"{run}: has no receipts; the first is written with the first checkpoint")
        self.steps = max(self.links)

    def version(self, step: int) -> int:
        """By which a step's digest went into the chain: that of the last receipt which begins at the step or before."""
        at = max(0, bisect.bisect_right(self.receipts, step, key=lambda r: r.first) - 1)
        return self.receipts[at].version if self.receipts else receipt.VERSION

    def segment(self, step: int) -> int:
        """The number of the segment that a step is in."""
        return max(i for i, plan in enumerate(self.plans) if plan.begins <= step)

    def _checkpoints(self, run: Location) -> Iterator[Link]:
        for step in layout.steps(run):
            try:
                index = layout.open_checkpoint(run, step).index
            except CheckpointError:
                continue  # it does not exist
            said = index["receipt"]
            if index["data_digest"] not in {p.digest for p in self.plans[: self.segment(said["steps"] - 1)]}:
                yield Link(f"checkpoint {step}", said["steps"], said["chain"])


def receipts(run: Location) -> list[Receipt]:
    """Reads every receipt of a run, by the step that each begins at."""
    folder = run.join(run_folder.RECEIPTS)

    def read(name: str) -> Receipt:
        raw = SEALED.read(folder.join(name))
        found = Receipt(name, raw["first"], raw["steps"], raw["chain"], raw["data_digest"], raw.get("version", 1))
        if found.version not in receipt.CONTENTS:
            raise VerifyError(
                f"{folder.join(name)}: is of version {found.version}, which a newer heliostat wrote; check with that"
            )
        if found.end != run_folder.step_of(name):
            raise VerifyError(f"{folder.join(name)}: ends at step {found.end}, and is named after another")
        return found

    with ThreadPoolExecutor(READERS) as pool:
        return sorted(pool.map(read, [name for name, _ in folder.files()]), key=lambda r: r.first)
