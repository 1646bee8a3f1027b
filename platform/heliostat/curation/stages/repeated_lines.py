"""Removes lines, or paragraphs, that another document has too: one occurrence of each stays in the whole set.

(Wenzek et al., CCNet, 2019, arXiv 1911.00359: paragraphs, which are lines there, compared in lower case, without punctuation and
with each digit as 0. Raffel et al., 2019, arXiv 1910.10683, do so for spans of three sentences of C4.) Menus, licences and
notices go so, which filters on single documents cannot find. The occurrence that stays is in the document whose id has the least
hash, and there the first: a function of the input, not of how it is cut. A document of which nothing is left is dropped. Parts
are compared by hashes of 64 bits: of 10^10 different ones, about three are taken for another. Memory is that of the different
parts in a share of all hashes. Put it behind `minhash`: of a near duplicate, it would leave the lines that differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from heliostat.config.schema import Float
from heliostat.curation import registry, repeated, tally
from heliostat.curation.chain import bytes_of
from heliostat.curation.engine import Curated, groups
from heliostat.curation.flow import Flow, Task
from heliostat.curation.minhash import components
from heliostat.curation.repeated import BETWEEN, Parts, Unit
from heliostat.curation.segment import Run, Spiller, documents_of, store
from heliostat.curation.stage import Document, GlobalStage, Outcome
from heliostat.curation.work import key
from heliostat.storage import Location

ROW_BYTES = 120  # of memory for each occurrence that a task goes through, sorting included
RUNS = 8  # that a task rewrites


class RepeatedLines(GlobalStage):
    """Removes lines or paragraphs that are in another document, or earlier in the same one."""

    reasons: ClassVar = {
        "repeated": "a larger share of words in repeated lines than max_removed_words",
        "empty": "nothing but repeated lines",
    }
    thresholds: ClassVar = {"removed_words": ("max_removed_words",)}

    unit: Unit = "line"
    """What is compared: every `line`, or every `paragraph`, which ends at an empty line."""
    min_words: int = Field(3, ge=1)
    """Lines or paragraphs of fewer words stay, however often they occur."""
    normalise: bool = True
    """Compares in lower case, without punctuation and with each digit as 0."""
    max_removed_words: Float = Field(1.0, ge=0, le=1)
    """Documents with a larger share of their words in what is removed are dropped (`repeated`); 1 drops none."""

    def compare(self, flow: Flow, found: Curated, number: int, memory_limit: int) -> list[Run]:
        kind, runs, parts = f"repeated-{number}", found.runs, Parts(self.unit, self.min_words, self.normalise)
        signing = (Task(key(run.name, run.decided, self.version, vars(parts)), {"run": run, "parts": parts}, bytes=run.bytes)
                   for run in runs)  # fmt: skip
        signed = flow.all(f"{kind}-sign", repeated.sign, signing)
        shares = max(1, -(-sum(r["rows"] for r in signed) * ROW_BYTES // memory_limit))
        chosen = flow.all(f"{kind}-choose", repeated.choose, components.tasks(flow, shares, [r["signed"] for r in signed]))
        names = [name for r in chosen for name in r["lost"]]
        records = flow.all(f"{kind}-remove", remove, self._removing(flow, runs, names, number, memory_limit))
        seconds = sum(s for name, s in flow.seconds.items() if name.startswith(f"{kind}-"))
        told = tally.entry({}, "") | {"seconds": seconds}
        found.tallies.append(store(flow.work.spill, {tally.label(number, self): told}))
        return [run for record in records for run in found.take(record)]

    def _removing(self, flow: Flow, runs: list[Run], names: list[str], number: int, memory_limit: int) -> Iterator[Task]:
        shared, first, follows = {"names": flow.share(names)}, 0, key(names, self.identity(), memory_limit)
        for group in groups(runs, RUNS):
            told = [[run.name, run.decided] for run in group]
            arguments = {"first": first, "runs": group, "entry": self.entry(), "number": number, "memory_limit": memory_limit}
            yield Task(key(follows, first, number, told), arguments, shared, sum(run.bytes for run in group))
            first += len(group)

    def outcome(self, document: Document, lost: set[int]) -> Outcome:
        """Removes parts of a document by their places, or drops it."""
        if not lost:
            return Outcome(document, measures={"removed_words": 0.0})
        assert isinstance(document.text, str)
        between = BETWEEN[self.unit]
        parts = document.text.split(between)
        removed = sum(len(parts[place].split()) for place in lost)
        share, counts = removed / sum(len(part.split()) for part in parts), {f"{self.unit}s_removed": len(lost)}
        text = between.join(part for place, part in enumerate(parts) if place not in lost)
        if not text.strip() or share > self.max_removed_words:
            reason = "repeated" if text.strip() else "empty"
            detail = f"{len(lost):,} of {len(parts):,} {self.unit}s"
            return Outcome(None, reason, detail, {"removed_words": share}, counts)
        return Outcome(Document(document.id, text, document.columns), measures={"removed_words": share}, counts=counts)


def remove(folder: Location, first: int, runs: list[Run], entry: dict[str, Any], number: int, memory_limit: int,
           names: list[str]) -> dict[str, Any]:  # fmt: skip
    """Spills the documents of some runs again, without what is repeated in them."""
    stage = registry.parse(entry)
    assert isinstance(stage, RepeatedLines)
    name, counts, out = tally.label(number, stage), dict[str, Any](), Spiller(folder, memory_limit // 8)
    for run, lost in repeated.lost_of(folder, first, runs, names):
        for row, document in documents_of(folder, run):
            outcome = stage.outcome(document, lost.get(row, set()))
            after = 0 if outcome.document is None else bytes_of(outcome.document)
            tally.count(counts, name, stage, document, outcome, (bytes_of(document), after))
            if outcome.document is None:
                out.leave_out(document.id, name, outcome.reason, outcome.detail, outcome.measures)
            else:
                out.add(outcome.document)
    return out.record(counts)
