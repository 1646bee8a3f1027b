"""Completes a stage that compares documents: records the dropped documents, and adds the stage's counts to the funnel (the counts
per stage)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from heliostat.curation import recording, segment, tally
from heliostat.curation.engine import Curated, filled
from heliostat.curation.segment import SpilledRun, by_run, survivors
from heliostat.curation.stage import GlobalStage
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.clusters import CountedTasks
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.merging import exchanged
from heliostat.tasks.pool import TaskFunction
from heliostat.tasks.work import key

LARGEST = 20  # largest clusters to list
DOCUMENT_BYTES = 4000  # bytes of memory per document in a task: both ids and the columns, some of them several times
RUNS = 8  # runs per task, approximately
JUDGED = pa.schema([("key", pa.uint64()), *((name, pa.large_string()) for name in ("reason", "detail", "measures"))])
"""Schema of the dropped documents. `key`: the document's position, (number of a temporary file) << 32 | row in this file."""


def parts(bytes: int, memory_limit: int) -> int:
    """Returns the number of parts into which `bytes` bytes of keys are split, so that a part has at most `memory_limit` bytes."""
    return max(1, -(-bytes // memory_limit))


def by_runs(flow: Flow, kind: str, runs: list[SpilledRun], names: list[str], memory_limit: int, **more: object) -> CountedTasks:
    """Returns tasks that each process some temporary files of documents (`runs`). A task reads the rows about these documents
    from the files `names`. Each task gets as many files of documents as fit into its memory."""
    groups = list(filled(runs, lambda run: run.rows, memory_limit // DOCUMENT_BYTES, RUNS))
    return about(flow, kind, groups, names, **more)


def adding(task: Task, **more: object) -> Task:
    """Returns a copy of a task with additional arguments. These arguments also become part of the task's key."""
    return replace(task, key=key(task.key, more), arguments={**task.arguments, **more})


def about(
    flow: Flow, kind: str, groups: list[list[SpilledRun]], names: list[str], also: object = None, **more: object
) -> CountedTasks:
    """Returns one task per group of temporary files of documents. Each task reads the rows about its group's documents from the
    files `names`. `also`: additional parts of the tasks' keys."""
    firsts = list(accumulate((len(group) for group in groups), initial=0))
    ranges = [(first << 32, stop << 32) for first, stop in pairwise(firsts)]

    def task(group: list[SpilledRun], first: int, names_of_group: tuple[str, object, int]) -> Task:
        decisions, bytes = [[run.name, run.decided] for run in group], sum(run.bytes for run in group) + names_of_group[2]
        follows, shared = key(names_of_group[0], also, first, decisions, more), {"names": names_of_group[1]}
        return Task(follows, {"first": first, "runs": group, **more}, shared, bytes)

    return CountedTasks(map(task, groups, firsts, exchanged(flow, kind, names, ranges)), len(groups))


def conclude(flow: Flow, curated: Curated, stage: GlobalStage, number: int, kind: str, judged: list[dict[str, Any]],
             memory_limit: int, **more: Any) -> list[SpilledRun]:  # fmt: skip
    """Drops the documents that a comparing stage chose to drop, and adds the stage's counts to `curated`. Returns the files of
    documents, without the dropped documents.

    Each record in `judged` has the name of a file of JUDGED rows, perhaps the names of `further` files, and `clusters`,
    `largest`, and `sizes`. `more`: additional fields for the stage's counts.
    """
    label, runs = tally.label(number, stage), curated.runs
    names = [name for r in judged for name in (r["judged"], *r.get("further", ()))]
    work = by_runs(flow, kind, runs, names, memory_limit, stage=label, **recording.arguments(curated.every))
    dropped, left = settled(flow, curated, kind, decide, work)
    part = stage_tally(flow, kind, runs, left, judged)
    for reason in stage.reasons:
        gone = dropped[f"{label}: {reason}"]
        part["dropped"] |= {reason: gone} if gone else {}
    counts = {**part["counts"], **more.pop("counts", {})}
    curated.tallies.append(segment.store(flow.work.spill, {label: {**part, **more, "counts": counts}}))
    return left


def settled(flow: Flow, curated: Curated, kind: str, decide: TaskFunction,
            tasks: Iterator[Task]) -> tuple[Counter[str], list[SpilledRun]]:  # fmt: skip
    """Runs the tasks that list the dropped documents of each file of documents. Returns the numbers of dropped documents by
    reason, and the files without the dropped documents."""

    def take(record: dict[str, Any]) -> bytes:
        counts.update(record["reasons"])
        curated.take({**record, "runs": []})
        return json.dumps(record["decided"]).encode()  # a quarter of the list's memory

    counts = Counter[str]()
    taken = flow.taken(f"{kind}-decide", decide, tasks, take)
    gone = (out for decided in taken for out in json.loads(decided))
    return counts, [without(run, *out) for run, out in zip(curated.runs, gone, strict=True)]


def counted(sizes: Iterable[int]) -> dict[str, int]:
    """Counts clusters by size. Returns a mapping for JSON: number of documents (as a string) -> number of clusters."""
    return {str(size): number for size, number in sorted(Counter(sizes).items())}


def stage_tally(
    flow: Flow, kind: str, before: list[SpilledRun], after: list[SpilledRun], clusters: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the counts of a stage that compares documents: input, output, and the largest clusters. The numbers of drops by
    reason aren't included."""
    part = tally.entry({}, "")
    part |= {"documents": sum(r.rows for r in before), "bytes": sum(r.bytes for r in before),
             "kept": sum(r.rows for r in after), "kept_bytes": sum(r.bytes for r in after)}  # fmt: skip
    part["seconds"] = sum(seconds for name, seconds in flow.seconds.items() if name.startswith(f"{kind}-"))
    part["counts"] = {"clusters": sum(r["clusters"] for r in clusters)}
    sizes = Counter[str]()
    for record in clusters:
        sizes.update(record["sizes"])
    part["sizes"] = dict(sorted(sizes.items(), key=lambda pair: int(pair[0])))
    part["largest"] = sorted((pair for r in clusters for pair in r["largest"]), key=lambda p: (-p[0], p[1]))[:LARGEST]
    return part


def without(run: SpilledRun, decided: str | None, rows: int, bytes: int) -> SpilledRun:
    """Returns a file of documents without the rows that the file `decided` lists as dropped. If `decided` is None, returns the
    file of documents unchanged."""
    return SpilledRun(run.name, run.rows - rows, run.bytes - bytes, (*run.decided, decided)) if decided else run


def decide(
    folder: Location, first: int, runs: list[SpilledRun], stage: str, names: list[str], every: int = 1
) -> dict[str, object]:
    """Writes the dropped documents of some files of documents to temporary files, with the reasons."""
    out, files, decided = segment.Spiller(folder, 1, every), list[str](), [list[str | int | None]([None, 0, 0]) for _ in runs]
    for number, judged in by_run(folder, first, len(runs), names):
        why, gone, size = {row["key"] & 0xFFFFFFFF: row for row in judged.to_pylist()}, [segment.DECIDED.empty_table()], 0
        for table in survivors(folder, runs[number - first], columns=["id", "bytes", "columns"]):
            table = table.filter(pa.array(np.isin(table["row"].to_numpy(), np.array(list(why), np.uint32))))
            for row in table.to_pylist():
                about = why[row["row"]]
                measures = json.loads(about["measures"]) if about["measures"] else None
                out.leave_out(row["id"], stage, about["reason"], about["detail"], measures, row["columns"])
                size += row["bytes"]
            gone.append(table.select(segment.DECIDED.names))
        name = spill.write(folder, pa.concat_tables(gone), ("row",))
        decided[number - first] = [name, len(why), size]
        files.append(name)
    record = out.record({})
    return record | {"decided": decided, "files": [*record["files"], *files]}
