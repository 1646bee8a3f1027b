"""Finds the parts that several documents share, and removes all occurrences except the first, for any number of documents.

A first task hashes the parts of the documents in one file, and finds the first occurrence of each hash in this file. It writes
this occurrence to a temporary file, and the positions of the other occurrences to a second one, because these are removed in any
case. A second task reads the hashes in one range of keys, and finds the first occurrence in all files. It writes the positions of
the others to a temporary file, sorted by document. So a line that is in every document is one row per file of documents in one
task. The documents' ids decide which occurrence is the first.

The compared parts are lines, paragraphs, or windows of words. Windows are chosen by content (winnowing: Schleimer, Wilkerson and
Aiken 2003). Of every `size` consecutive windows, the window with the smallest hash is chosen. So if two texts share a span of 2 *
`size` - 1 words, both texts choose the same window in this span.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
from pydantic import Field

from heliostat.curation import recording, registry, tally
from heliostat.curation.chain import bytes_of
from heliostat.curation.comparable import words
from heliostat.curation.comparing import about, adding
from heliostat.curation.engine import Curated, filled
from heliostat.curation.minhash import components
from heliostat.curation.segment import (
    FINISH,
    DocumentSource,
    SegmentRecord,
    SpilledRun,
    Spiller,
    by_run,
    documents_of,
    store,
    survivors,
)
from heliostat.curation.stage import Document, Dropped, GlobalStage, Outcome
from heliostat.schema import Float
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.clusters import CountedTasks
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.merging import by_parts
from heliostat.tasks.work import key

Unit = Literal["line", "paragraph"]
BETWEEN = {"line": "\n", "paragraph": "\n\n"}
SIGNED = pa.schema(
    [("key", pa.uint64()), ("document", pa.uint64()), ("node", pa.uint64()), ("place", pa.uint32())]
)  # of gathered occurrences


class Signing(Protocol):
    """Hashes the comparable parts of texts. Ray sends an object of this class to tasks, so the object has only plain fields."""

    def hashes(self, text: str) -> list[tuple[int, int]]:
        """Lists (position, content hash) of a text's parts."""
        ...


@dataclass(frozen=True)
class ComparedParts:
    """Hashes those lines or paragraphs of a text that have at least `min_words` words each."""

    unit: Unit
    min_words: int
    normalise: bool

    def hashes(self, text: str) -> list[tuple[int, int]]:
        """Lists (position, content hash) of the parts of a text that have enough words."""
        parts = text.split(BETWEEN[self.unit])
        part_words = words(parts)
        long = np.flatnonzero(part_words.counts >= self.min_words)
        if not self.normalise:
            return [(i, recording.key_of(" ".join(parts[i].split()))) for i in long.tolist()]
        ends = np.cumsum(part_words.counts)[long]
        return list(zip(long.tolist(), part_words.spans(ends - part_words.counts[long], ends).tolist(), strict=True))


def sign(folder: Location, run: SpilledRun, parts: Signing) -> dict[str, object]:
    """Writes a row for each different part of the documents in `run`, a temporary file of documents, to another temporary file. A
    row has the hash of the part, and the part's first occurrence: the hash of the document's id, the document's row, and the
    position. Writes the positions of the other occurrences to a second temporary file. `parts`: the number of occurrences."""
    signed: list[tuple[int, int, int, int]] = []
    for table in survivors(folder, run, columns=["id", "text"]):
        for row, id, text in zip(table["row"].to_pylist(), table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
            document = recording.key_of(id)
            signed += [(hash, document, row, place) for place, hash in parts.hashes(text)]
    hashes, documents, rows, places = zip(*signed, strict=True) if signed else ((), (), (), ())
    table = pa.table({"key": np.array(hashes, np.uint64), "document": np.array(documents, np.uint64),
                      "row": np.array(rows, np.uint32), "place": np.array(places, np.uint32)})  # fmt: skip
    table, others = _divided(table)
    lost = pa.table({"key": others["row"].cast(pa.uint64()), "place": others["place"]})
    names = [spill.write(folder, table, ("document", "row", "place")), *([spill.write(folder, lost, ("place",))] if lost else [])]
    return {"signed": names[0], "rows": len(table), "lost": names[1] if lost else None, "parts": len(signed), "files": names}


def _divided(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Divides occurrences into the first of each hash, and the others. The first is the first position in the document whose id
    has the smallest hash."""
    keys, documents, places = (table[name].to_numpy() for name in ("key", "document", "place"))
    order = np.lexsort((places, documents, keys))
    start = spill.starts(keys[order])
    of = order[np.flatnonzero(start)[np.cumsum(start) - 1]]  # the first occurrence of each occurrence's hash, in this order
    first = np.zeros(len(keys), bool)
    first[order] = (documents[order] == documents[of]) & (places[order] == places[of])
    return table.filter(pa.array(first)), table.filter(pa.array(~first))


def choose(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Writes the positions of the repeated parts to remove (all occurrences except the first) to a temporary file, sorted by
    document. Processes the hashes in key range `part` of `parts`."""
    _, lost = _divided(spill.joined(folder, names, *spill.share(part, parts), SIGNED))
    files = [spill.write(folder, pa.table({"key": lost["node"], "place": lost["place"]}), ("place",))] if lost else []
    return {"lost": files, "files": files}


def lost_of(folder: Location, first: int, runs: list[SpilledRun], within: list[str | None],
            names: list[str]) -> Iterator[tuple[SpilledRun, dict[int, set[int]]]]:  # fmt: skip
    """Yields (temporary file of documents, mapping). The mapping has the parts to remove: a document's row -> positions in the
    document. `first`: the number of the first file; `within`: for each file, the positions of parts that are earlier in it."""
    lost = dict(by_run(folder, first, len(runs), names))
    for number, (run, own) in enumerate(zip(runs, within, strict=True), first):
        lost_parts: dict[int, set[int]] = {}
        tables = [*([lost.pop(number)] if number in lost else []), *(spill.read(folder, own) if own else ())]
        for table in tables:
            rows = (table["key"].to_numpy() & np.uint64(0xFFFFFFFF)).tolist()
            for row, place in zip(rows, table["place"].to_pylist(), strict=True):
                lost_parts.setdefault(row, set()).add(place)
        yield run, lost_parts


@dataclass(frozen=True)
class WordWindows:
    """Hashes windows of `size` consecutive words of a text. The content decides which windows are chosen (winnowing)."""

    size: int

    def hashes(self, text: str) -> list[tuple[int, int]]:
        """Lists (number of the first word, hash) of the chosen windows. A text with fewer than 2 * `size` words has no
        windows."""
        windows, _ = words([text]).ngrams(self.size)
        places = least(windows, self.size)
        return list(zip(places.tolist(), windows[places].tolist(), strict=True))


def least(hashes: np.ndarray, size: int) -> np.ndarray:
    """Finds the smallest hash of every `size` consecutive hashes. Returns the positions of these hashes, each position once."""
    from heliostat.curation.word_hashes import smallest  # imports Numba

    places = np.empty(len(hashes), np.int64)
    return places[: smallest(hashes, size, places)]


def spans(lost: set[int], size: int) -> list[tuple[int, int]]:
    """Joins windows that overlap or touch. Returns (first word, word after the last word) of each span."""
    stretches: list[tuple[int, int]] = []
    for place in sorted(lost):
        if stretches and place <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], place + size)
        else:
            stretches.append((place, place + size))
    return stretches


ROW_BYTES = 120  # bytes of memory per occurrence in a task, including the sort
REWRITTEN = 8  # runs that a task rewrites


@dataclass(frozen=True)
class Cut:
    """Holds a text without its repeated parts, the share of its words that were removed, and the number of removed parts.
    `detail` describes the removal."""

    text: str
    removed_words: float
    detail: str
    counts: dict[str, int]


class RepeatingStage(GlobalStage):
    """Removes parts that several documents share, such as lines, except the first occurrence. A subclass defines the parts and
    the removal."""

    changes: ClassVar[bool] = True
    needs: ClassVar = ("curation", "numba")
    version: ClassVar[int] = 3  # version 3: words as in `comparable`, and texts that become too short are dropped
    reasons: ClassVar = {
        "repeated": "a larger share of words in what is repeated than max_removed_words",
        "empty": "nothing but what is repeated",
    }
    thresholds: ClassVar = {"removed_words": ("max_removed_words",)}

    max_removed_words: Float = Field(1.0, ge=0, le=1)
    """Maximum share of a document's words that may be removed. Documents above this share are dropped (`repeated`); 1 drops
    none."""

    @abstractmethod
    def signing(self) -> Signing:
        """Returns the object that hashes the parts of texts."""

    @abstractmethod
    def cut(self, text: str, lost: set[int]) -> Cut:
        """Returns a text without the parts at the positions in `lost`."""

    def compare(self, flow: Flow, curated: Curated, number: int, memory_limit: int) -> list[SpilledRun]:
        kind, runs, parts = f"repeated-{number}", curated.runs, self.signing()
        identity = [self.named(), self.version, vars(parts), self.library_versions(), "first of each file"]
        signing = (Task(key(run.name, run.decided, identity), {"run": run, "parts": parts}, bytes=run.bytes) for run in runs)
        signed = flow.all(f"{kind}-sign", sign, CountedTasks(signing, len(runs)))
        shares = max(1, -(-sum(r["rows"] for r in signed) * ROW_BYTES // memory_limit))
        rows = [(r["signed"], r["rows"]) for r in signed]
        gathered = components.gathered(flow, f"{kind}-gather", rows, shares, components.gather)
        keys = [r["gathered"] for r in gathered if r["gathered"]]
        chosen = flow.all(f"{kind}-choose", choose, by_parts(flow, kind, shares, keys))
        names = [name for r in chosen for name in r["lost"]]
        room, within = memory_limit // 2 // ROW_BYTES, iter([r["lost"] for r in signed])
        counted = filled(zip(runs, signed, strict=True), lambda one: one[1]["parts"], room, REWRITTEN)
        groups = [[run for run, _ in group] for group in counted]
        more = recording.arguments(curated.every)
        arguments = {"entry": self.entry(), "number": number, "memory_limit": memory_limit, **more}
        also, source = [self.identity(), curated.identity], flow.share(curated.source)
        tasks = about(flow, kind, groups, names, also, **arguments)
        numbered = (adding(task, within=list(islice(within, len(task.arguments["runs"])))) for task in tasks)
        removing = (replace(task, shared=task.shared | {"source": source}) for task in numbered)
        records = flow.all(f"{kind}-remove", remove, CountedTasks(removing, tasks.count))
        seconds = sum(s for name, s in flow.seconds.items() if name.startswith(f"{kind}-"))
        curated.tallies.append(store(flow.work.spill, {tally.label(number, self): tally.entry({}, "") | {"seconds": seconds}}))
        return [run for record in records for run in curated.take(record)]

    def outcome(self, document: Document, lost: set[int]) -> Outcome:
        """Removes the parts of a document at the positions in `lost`, or drops the document."""
        if not lost:
            return Outcome(document, measures={"removed_words": 0.0})
        assert isinstance(document.text, str)
        shortened = self.cut(document.text, lost)
        measures = {"removed_words": shortened.removed_words}
        if not shortened.text.strip():
            return Outcome(None, "empty", shortened.detail, measures, shortened.counts)
        if shortened.removed_words > self.max_removed_words:
            return Outcome(None, "repeated", shortened.detail, measures, shortened.counts)
        left = Document(document.id, shortened.text, document.columns, document.picture)
        return Outcome(left, measures=measures, counts=shortened.counts)


def remove(folder: Location, first: int, runs: list[SpilledRun], entry: dict[str, Any], number: int, memory_limit: int,
           within: list[str | None], names: list[str], source: DocumentSource | None,
           every: int = 1) -> SegmentRecord:  # fmt: skip
    """Writes the documents in some temporary files to new temporary files, without the repeated parts. `source` converts changed
    documents to their stored form."""
    stage = registry.parse(entry)
    assert isinstance(stage, RepeatingStage)
    name, counts, out = tally.label(number, stage), dict[str, Any](), Spiller(folder, memory_limit // 8, every)
    for run, lost in lost_of(folder, first, runs, within, names):
        for row, document in documents_of(folder, run):
            places = lost.get(row, set())
            outcome = stage.outcome(document, places)
            after = 0 if outcome.document is None else bytes_of(outcome.document)
            tally.count(counts, name, stage, document, outcome, (bytes_of(document), after))
            if outcome.document is None:
                out.leave_out(document.id, name, outcome.reason, outcome.detail, outcome.measures, document.columns)
                continue
            shortened = source.finish(outcome.document) if source is not None and places else outcome.document
            if isinstance(shortened, Dropped):
                dropped = tally.entry(counts, FINISH)["dropped"]
                dropped[shortened.reason] = dropped.get(shortened.reason, 0) + 1
                out.leave_out(shortened.id, FINISH, shortened.reason, f"after {name}", columns=document.columns)
            else:
                out.add(shortened)
    return out.record(counts)
