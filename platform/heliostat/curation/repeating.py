"""Defines what stages have in common that remove from documents what others have too: their tasks, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field

from heliostat.curation import registry, repeated, tally
from heliostat.curation.chain import bytes_of
from heliostat.curation.comparing import about
from heliostat.curation.engine import Curated, filled
from heliostat.curation.minhash import components
from heliostat.curation.repeated import Signing
from heliostat.curation.segment import FINISH, DocumentSource, SpilledRun, Spiller, documents_of, store
from heliostat.curation.stage import Document, Dropped, GlobalStage, Outcome
from heliostat.schema import Float
from heliostat.storage.locations import Location
from heliostat.tasks import libraries
from heliostat.tasks.exchange import by_parts
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key

ROW_BYTES = 120  # of memory for each occurrence that a task goes through, sorting included
RUNS = 8  # that a task rewrites


@dataclass(frozen=True)
class Cut:
    """Holds a text without what is repeated in it, how much of it that was, and what it is called."""

    text: str
    removed_words: float
    detail: str
    counts: dict[str, int]


class RepeatingStage(GlobalStage):
    """Removes what documents have in common, all but one occurrence; a subclass says what is compared, and how it is cut out."""

    version: ClassVar[int] = 3  # words are those of `comparable`, and what is left too short is dropped
    reasons: ClassVar = {
        "repeated": "a larger share of words in what is repeated than max_removed_words",
        "empty": "nothing but what is repeated",
    }
    thresholds: ClassVar = {"removed_words": ("max_removed_words",)}

    max_removed_words: Float = Field(1.0, ge=0, le=1)
    """Documents with a larger share of their words in what is removed are dropped (`repeated`); 1 drops none."""

    def signing(self) -> Signing:
        """Returns what hashes the parts of texts that are compared."""
        raise NotImplementedError

    def cut(self, text: str, lost: set[int]) -> Cut:
        """Removes parts of a text by their places."""
        raise NotImplementedError

    def compare(self, flow: Flow, found: Curated, number: int, memory_limit: int) -> list[SpilledRun]:
        kind, runs, parts = f"repeated-{number}", found.runs, self.signing()
        told = [self.named(), self.version, vars(parts), libraries.of(self.named())]
        signing = (Task(key(run.name, run.decided, told), {"run": run, "parts": parts}, bytes=run.bytes) for run in runs)
        signed = flow.all(f"{kind}-sign", repeated.sign, signing)
        shares = max(1, -(-sum(r["rows"] for r in signed) * ROW_BYTES // memory_limit))
        counts = [r["rows"] for r in signed]
        keys = components.gathered(flow, kind, [(r["signed"], count) for r, count in zip(signed, counts, strict=True)], shares)
        chosen = flow.all(f"{kind}-choose", repeated.choose, by_parts(flow, kind, shares, keys))
        names = [name for r in chosen for name in r["lost"]]
        room, numbered = memory_limit // 2 // ROW_BYTES, zip(runs, counts, strict=True)
        groups = [[run for run, _ in group] for group in filled(numbered, lambda one: one[1], room, RUNS)]
        arguments = {"entry": self.entry(), "number": number, "memory_limit": memory_limit}
        also, source = [self.identity(), found.identity], flow.share(found.source)
        removing = (
            replace(task, shared=task.shared | {"source": source}) for task in about(flow, kind, groups, names, also, **arguments)
        )
        records = flow.all(f"{kind}-remove", remove, removing)
        seconds = sum(s for name, s in flow.seconds.items() if name.startswith(f"{kind}-"))
        found.tallies.append(store(flow.work.spill, {tally.label(number, self): tally.entry({}, "") | {"seconds": seconds}}))
        return [run for record in records for run in found.take(record)]

    def outcome(self, document: Document, lost: set[int]) -> Outcome:
        """Removes parts of a document by their places, or drops it."""
        if not lost:
            return Outcome(document, measures={"removed_words": 0.0})
        assert isinstance(document.text, str)
        made = self.cut(document.text, lost)
        measures = {"removed_words": made.removed_words}
        if not made.text.strip():
            return Outcome(None, "empty", made.detail, measures, made.counts)
        if made.removed_words > self.max_removed_words:
            return Outcome(None, "repeated", made.detail, measures, made.counts)
        left = Document(document.id, made.text, document.columns, document.picture)
        return Outcome(left, measures=measures, counts=made.counts)


def remove(folder: Location, first: int, runs: list[SpilledRun], entry: dict[str, Any], number: int, memory_limit: int,
           names: list[str], source: DocumentSource | None) -> dict[str, Any]:  # fmt: skip
    """Spills the documents of some runs again, without what is repeated in them; `source` finishes those that were cut."""
    stage = registry.parse(entry)
    assert isinstance(stage, RepeatingStage)
    name, counts, out = tally.label(number, stage), dict[str, Any](), Spiller(folder, memory_limit // 8)
    for run, lost in repeated.lost_of(folder, first, runs, names):
        for row, document in documents_of(folder, run):
            places = lost.get(row, set())
            outcome = stage.outcome(document, places)
            after = 0 if outcome.document is None else bytes_of(outcome.document)
            tally.count(counts, name, stage, document, outcome, (bytes_of(document), after))
            if outcome.document is None:
                out.leave_out(document.id, name, outcome.reason, outcome.detail, outcome.measures, document.columns)
                continue
            made = source.finish(outcome.document) if source is not None and places else outcome.document
            if isinstance(made, Dropped):
                dropped = tally.entry(counts, FINISH)["dropped"]
                dropped[made.reason] = dropped.get(made.reason, 0) + 1
                out.leave_out(made.id, FINISH, made.reason, f"after {name}", columns=document.columns)
            else:
                out.add(made)
    return out.record(counts)
