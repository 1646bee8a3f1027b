"""Drops near-duplicates: documents with very similar sets of word n-grams, found by MinHash and locality-sensitive hashing.

The method is from Broder, On the resemblance and containment of documents, 1997. The defaults are FineWeb's (Penedo et al., The
FineWeb Datasets, 2024): 14 bands of 8 rows over 5-grams of words. Documents with an equal band are candidates. Connected
candidates form a cluster, and one document of each cluster stays. The probability of finding a pair depends on the pair's Jaccard
similarity: 0.05 for a similarity of 0.5, 0.56 for 0.7, 0.92 for 0.8, and 0.9996 for 0.9. Exact duplicates are near-duplicates
too. Words are compared as in FineWeb (`heliostat.curation.comparable`). The clusters are the exact connected components of the
candidate pairs, and don't depend on how the input is split. A task has only a part of the keys or edges in memory, for any number
of documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from operator import itemgetter
from typing import Any, ClassVar

from pydantic import Field, model_validator

from heliostat.curation import comparing, recording, tally
from heliostat.curation.comparing import adding, by_runs, settled
from heliostat.curation.comparing import parts as parts_of
from heliostat.curation.engine import Curated, filled
from heliostat.curation.minhash import components, exact
from heliostat.curation.minhash.keep import Rule, candidates, choose, decide
from heliostat.curation.minhash.signatures import Parameters, sign
from heliostat.curation.segment import SpilledRun, store
from heliostat.curation.stage import GlobalStage
from heliostat.tasks import spill
from heliostat.tasks.clusters import CountedTasks
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.merging import by_parts
from heliostat.tasks.work import key

ROW_BYTES = 160  # bytes of memory per key, edge, or member in a task, including the sort
CHOICE_BYTES = 8 << 20  # bytes of the candidates' temporary files that a task reads: about a second
CHOICE_SHARE = 64  # such a task reads at most 1 / CHOICE_SHARE of `memory_limit`, because these files are compressed


class MinHash(GlobalStage):
    version: ClassVar = 2  # words from `comparable`, as in FineWeb: accents and numbers don't count
    compares: ClassVar = ("column", "within")
    needs: ClassVar = ("curation", "numba", "rensa")
    libraries: ClassVar[tuple[str, ...]] = ("regex", "rensa")
    reasons: ClassVar = {"near_duplicate": "much like another document, which stays"}

    bands: int = Field(14, ge=1, le=1000)
    """Number of bands of a signature. Two documents with an equal band are candidates."""
    rows: int = Field(8, ge=1, le=100)
    """Number of permutations per band."""
    ngram: int = Field(5, ge=1, le=100)
    """Words per n-gram."""
    seed: int = Field(1, ge=0)
    """Random seed of the permutations."""
    keep: Rule = "longest"
    """Document of a cluster to keep: `longest`, `first` (by id), `oldest` (by the date in `column`), or `best` (the largest
    number in `column`). In a tie, the first by id stays."""
    column: str = ""
    """Column that `oldest` and `best` compare. The column must be one of the pipeline's `columns.others`, or come from an earlier
    stage."""
    within: str = ""
    """Compares only documents with the same value in this column, like FineWeb, which compares pages of one crawl. The
    column must be one of the pipeline's `columns.others`, or come from an earlier stage. Unset: compares all documents."""

    @model_validator(mode="after")
    def _column(self) -> MinHash:
        if (self.keep in ("oldest", "best")) != bool(self.column):
            raise ValueError(
                f"keep: {self.keep!r} {'needs a column. Set column' if not self.column else 'compares no column. Remove column'}"
            )
        return self

    def compare(self, flow: Flow, curated: Curated, number: int, memory_limit: int) -> list[SpilledRun]:
        name, runs = tally.label(number, self), curated.runs
        kind = f"minhash-{number}"
        parameters = Parameters(self.bands, self.rows, self.ngram, self.seed, self.within)
        follows = [self.version, vars(parameters), self.library_versions()]
        repeated = self._repeated(flow, kind, runs, memory_limit)
        signing = (_signing(run, parameters, follows, name) for run, name in zip(runs, repeated, strict=True))
        signed = flow.taken(f"{kind}-sign", sign, CountedTasks(signing, len(runs)), _files_of)
        parts = parts_of(sum(rows for _, rows, *_ in signed) * ROW_BYTES, memory_limit)
        keys, written = [(name, rows) for name, rows, *_ in signed], iter([(copies, about) for _, _, copies, about in signed])
        del repeated, signing, signed  # each has a name per run
        met = components.gathered(flow, f"{kind}-meet", keys, parts, components.meet)
        del keys
        names = [r["met"] for r in met if r["met"]]
        paired = flow.all(f"{kind}-edges", components.pairs, by_parts(flow, kind, parts, names))
        connected = components.edges_of([*met, *paired])
        names, _ = components.stars(flow, kind, connected, parts, memory_limit // ROW_BYTES)
        rule = {"keep": self.keep, "column": self.column}
        groups = by_runs(flow, kind, runs, names, memory_limit, **rule)
        naming = (_naming(task, list(islice(written, len(task.arguments["runs"])))) for task in groups)
        fields = itemgetter("candidates", "belonging")
        named = flow.taken(f"{kind}-candidates", candidates, CountedTasks(naming, groups.count), fields)
        names = [name for name, _ in named]
        parts = min(parts, spill.bytes_of(names) // min(CHOICE_BYTES, memory_limit // CHOICE_SHARE) + 1)
        chosen = flow.all(f"{kind}-choose", choose, by_parts(flow, kind, parts, names))
        how, names = {"stage": name, **recording.arguments(curated.every)}, [r["chosen"] for r in chosen]
        groups = by_runs(flow, kind, runs, names, memory_limit, **how)
        deciding = (adding(task, belonging=name) for task, (_, name) in zip(groups, named, strict=True))
        _, left = settled(flow, curated, kind, decide, CountedTasks(deciding, groups.count))
        part = comparing.stage_tally(flow, kind, runs, left, chosen)
        part["dropped"] = {"near_duplicate": part["documents"] - part["kept"]} if part["documents"] > part["kept"] else {}
        curated.tallies.append(store(flow.work.spill, {name: part}))
        return left

    def _repeated(self, flow: Flow, kind: str, runs: list[SpilledRun], memory_limit: int) -> list[str | None]:
        """Finds the texts that several runs have. Returns, for each run, the temporary file that lists its documents with such
        texts (`exact.copies`), or None if the run has none."""
        groups = list(filled(runs, lambda run: run.rows, memory_limit // exact.ROW_BYTES, comparing.RUNS))
        identifying = CountedTasks(self._identifying(groups), len(groups))
        identified = flow.taken(f"{kind}-identify", exact.identify, identifying, itemgetter("rows", "texts"))
        texts = [name for _, name in identified]
        parts = parts_of(sum(rows for rows, _ in identified) * exact.ROW_BYTES, memory_limit)
        comparing_texts = by_parts(flow, f"{kind}-exact", max(parts, components.parts_of(texts, len(runs))), texts)
        shared = flow.all(f"{kind}-exact", exact.repeated, comparing_texts)
        names = [r["repeated"] for r in shared if r["rows"]]
        if not names:
            return [None] * len(runs)
        copying = by_runs(flow, f"{kind}-copies", runs, names, memory_limit)
        return [name for some in flow.taken(f"{kind}-copies", exact.copies, copying, itemgetter("copies")) for name in some]

    def _identifying(self, groups: list[list[SpilledRun]]) -> Iterator[Task]:
        """Yields the tasks that list the texts of several runs each."""
        first = 0
        for group in groups:
            arguments = {"first": first, "runs": group, "within": self.within}
            decisions = [[run.name, run.decided] for run in group]
            yield Task(key("identify", first, decisions, self.within), arguments, bytes=sum(run.bytes for run in group))
            first += len(group)


def _signing(run: SpilledRun, parameters: Parameters, follows: list[object], repeated: str | None) -> Task:
    """Builds the task that signs a run. A run that shares no text with another run has the same key as in earlier versions of
    heliostat, so finished tasks of these versions count."""
    task = Task(key(run.name, run.decided, follows), {"run": run, "parameters": parameters}, bytes=run.bytes)
    return adding(task, repeated=repeated) if repeated else task


def _files_of(record: dict[str, Any]) -> tuple[str, int, str | None, str | None]:
    """Returns from a record of `sign`: the file of keys, its rows, the file of copies, and the file about the documents. Earlier
    versions of heliostat wrote no file about the documents."""
    return record["keys"], record["rows"], record["copies"], record.get("about")


def _naming(task: Task, written: list[tuple[str | None, str | None]]) -> Task:
    """Adds the files that `sign` wrote for a task's runs: (copies, about the documents)."""
    return adding(task, copies=[copies for copies, _ in written], about=[about for _, about in written])
