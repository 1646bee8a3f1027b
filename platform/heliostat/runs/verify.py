"""Verifies a run against its data: recomputes every receipt, and uses only the manifests and the shards for this.

`verify` loads the samples on which each step had to train, and hashes these samples in the same way as training. `verify`
compares each step's digest, each link of the chain, and the chain that each checkpoint recorded. After a difference, `verify`
continues, and it recomputes even steps that no receipt covers. So one fault doesn't hide other faults. Because object storage
answers slowly, `verify` loads several units at the same time. Memory holds these units, and one bit per sample of the current
epochs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from heliostat.data import receipt
from heliostat.data.dataset import DataPlan, Dataset, open_dataset
from heliostat.data.order import SamplePlaces
from heliostat.runs.history import History, ReceiptFile
from heliostat.storage.locations import Location
from heliostat.terminal import console

AHEAD = 3  # number of units that are loaded at once


class Difference(NamedTuple):
    """Describes a difference between a recomputed value (`expected`) and the run's record (`found`).

    `what`: "digest", "chain", "data plan", or "receipt". The value "receipt" means that no receipt covers the step; then
    `found` is None.
    """

    step: int
    what: str
    where: str | None
    expected: str
    found: str | None


@dataclass(frozen=True)
class StepUnit:
    """Describes the steps [first, end) of one segment, which are loaded together."""

    segment: int
    data: Dataset
    first: int
    end: int
    versions: frozenset[int]  # versions of receipts; each step needs a digest per version


@dataclass(frozen=True)
class Recomputed:
    """Holds a unit's recomputed values: step digests by version of `receipt`, planned samples, and the number of bad
    samples."""

    digests: dict[int, list[str]]
    planned: SamplePlaces
    replaced: int


def units(history: History) -> Iterator[StepUnit]:
    """Divides all steps into units of complete rounds. A unit is at least as long as a shuffle window, so that most row groups
    are read only once."""
    ends = [*(p.begins for p in history.plans[1:]), history.steps]
    for number, (plan, last) in enumerate(zip(history.plans, ends, strict=True)):
        step, stop = plan.begins, min(last, history.steps)
        while step < stop:
            data, first, size = open_dataset(plan), step, 0
            while step < stop and size < plan.shape.window:
                inside = data.order.round_of(step)
                step += inside.first_step + inside.steps - data.order.data_step(step)
                size += inside.end - inside.begin
            end = min(step, stop)
            claimed = {r.version for r in history.receipts if r.first < end and r.end > first}
            yield StepUnit(number, data, first, end, frozenset(claimed | {history.version(s) for s in range(first, end)}))


def recompute(unit: StepUnit) -> Recomputed:
    """Recomputes a unit's step digests from the contents of its samples. Also locates the samples that the data order planned."""
    order = unit.data.order
    places = np.stack([order.step(step) for step in range(unit.first, unit.end)])  # [steps, virtual ranks, samples per rank]
    loaded = unit.data.load(places.ravel())
    by_version = {}
    for version in unit.versions:
        digests = receipt.sample_digests(loaded.samples, loaded.content, version).reshape(places.shape)
        by_version[version] = receipt.step_digests(np.array([[receipt.lane_digest(lane) for lane in step] for step in digests]))
    planned = order.locate(places.ravel()) if loaded.bad else loaded.samples
    return Recomputed(by_version, planned, len(loaded.bad))


def recomputed(history: History) -> Iterator[tuple[StepUnit, Recomputed]]:
    """Yields every unit in order, with its recomputed values. Meanwhile loads the next units."""
    with ThreadPoolExecutor(AHEAD) as pool:
        pending: deque[tuple[StepUnit, Future[Recomputed]]] = deque()
        try:
            for unit in units(history):
                pending.append((unit, pool.submit(recompute, unit)))
                if len(pending) == AHEAD:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class SeenSamples:
    """Tracks which samples the epochs of a segment have contained, with one bit per sample. Keeps the last two epochs of each
    source."""

    def __init__(self, data: Dataset) -> None:
        counts = [split.samples for split in data.order.splits]
        self._starts = [np.cumsum(n) - n for n in counts]
        self._bytes = [int(n.sum()) // 8 + 1 for n in counts]
        self._bits: dict[tuple[int, int], np.ndarray] = {}

    def add(self, samples: SamplePlaces) -> int:
        """Adds samples. Returns the number of samples that their epoch already contained."""
        repeated = 0
        for source, epoch in np.unique(np.stack([samples.source, samples.epoch], axis=1), axis=0).tolist():
            mine = (samples.source == source) & (samples.epoch == epoch)
            number = np.unique(self._starts[source][samples.chunk[mine]] + samples.row[mine])
            bits = self._bits.setdefault((source, epoch), np.zeros(self._bytes[source], np.uint8))
            byte, bit = number >> 3, np.left_shift(1, number & 7).astype(np.uint8)
            repeated += int(mine.sum()) - int(((bits[byte] & bit) == 0).sum())
            np.bitwise_or.at(bits, byte, bit)
        for source in range(len(self._bytes)):
            for epoch in sorted(e for s, e in self._bits if s == source)[:-2]:
                del self._bits[source, epoch]
        return repeated


class VerifyReport(TypedDict):
    """Describes the output of `heliostat run verify --json`.

    - `steps`: number of steps that receipts cover and whose receipts are all right.
    - `samples`: number of samples that receipts cover.
    - `lost`: number of planned samples before the last known step that no receipt covers.
    - `repeated`: number of samples that their epoch already contained. An epoch has as many positions as samples. So if
      `repeated` is 0, each sample comes once.
    - `replaced`: number of bad samples that other samples replaced.
    - `first_difference`: the fields of `Difference`, with the step counted from 1, as in all texts for people.
    """

    ok: bool
    steps: int
    samples: int
    lost: int
    repeated: int
    replaced: int
    first_difference: dict[str, int | str | None] | None


class Audit:
    """Compares recomputed values with the run's record, unit by unit."""

    def __init__(self, history: History) -> None:
        self.history, self.chain = history, receipt.GENESIS
        self.agreeing = self.samples = self.lost = self.repeated = self.replaced = 0
        self.first: Difference | None = None
        self._seen: tuple[int, SeenSamples] | None = None

    def take(self, unit: StepUnit, result: Recomputed) -> None:
        if self._seen is None or self._seen[0] != unit.segment:
            self._seen = (unit.segment, SeenSamples(unit.data))
        self.repeated += self._seen[1].add(result.planned)
        self.replaced += result.replaced
        near = [r for r in self.history.receipts if r.first < unit.end and r.end > unit.first]
        for number, step in enumerate(range(unit.first, unit.end)):
            digests = {version: steps[number] for version, steps in result.digests.items()}
            self._step(step, digests, self.history.plans[unit.segment], [r for r in near if r.first <= step < r.end])

    def _step(self, step: int, digests: dict[int, str], plan: DataPlan, claims: list[ReceiptFile]) -> None:
        own = digests[self.history.version(step)]
        self.chain = receipt.extend(self.chain, [own])
        differences = []
        for claim in claims:
            if claim.data_digest != plan.digest:
                differences.append(Difference(step, "data plan", claim.where, plan.digest, claim.data_digest))
            if claim.steps[step - claim.first] != (digest := digests[claim.version]):
                differences.append(Difference(step, "digest", claim.where, digest, claim.steps[step - claim.first]))
        if claims:
            self.samples += plan.shape.batch
        else:
            self.lost += plan.shape.batch
            differences.append(Difference(step, "receipt", None, own, None))
        self.agreeing += not differences
        for link in self.history.links.get(step + 1, []):
            if link.chain != self.chain:
                differences.append(Difference(step, "chain", link.where, self.chain, link.chain))
        if differences and self.first is None:
            self.first = differences[0]

    def report(self) -> VerifyReport:
        return {
            "ok": self.first is None and not self.repeated,
            "steps": self.agreeing,
            "samples": self.samples,
            "lost": self.lost,
            "repeated": self.repeated,
            "replaced": self.replaced,
            "first_difference": self.first._replace(step=self.first.step + 1)._asdict() if self.first else None,
        }


def verify(run: Location) -> VerifyReport:
    """Verifies that the run trained on the samples of its data plans."""
    history = History(run)
    audit = Audit(history)
    columns = (TextColumn("verifying"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=history.steps)
        for unit, result in recomputed(history):
            audit.take(unit, result)
            progress.update(task, completed=unit.end)
    return audit.report()


def explain(report: VerifyReport) -> str:
    """Explains in one line why a run failed verification: names the first step that differs, or the samples that are repeated in
    an epoch."""
    first = report["first_difference"]
    if not first:
        return f"{report['repeated']:,} samples come twice within an epoch, so the order of samples is wrong"
    step, where, expected, actual = (first[k] for k in ("step", "where", "expected", "found"))
    if first["what"] == "receipt":
        return (
            f"step {step} is the first step without a receipt. In total, {report['lost']:,} samples have no receipt. "
            "A receipt file is missing"
        )
    names = {
        "digest": "the digest of the step's samples",
        "chain": "the hash chain after the step",
        "data plan": "the step's data plan",
    }
    return f"step {step} is the first step that differs: {names[str(first['what'])]} is {expected}, but {where} has {actual}"
