"""Ends a comparison of documents: tells every run which of its documents go, and the funnel what the stage did."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from heliostat.curation import segment, spill, tally
from heliostat.curation.engine import Curated
from heliostat.curation.flow import Flow, Task
from heliostat.curation.segment import Run, survivors
from heliostat.curation.stage import GlobalStage
from heliostat.curation.work import key
from heliostat.storage import Location

LARGEST = 20  # clusters that are told
JUDGED = pa.schema([("key", pa.uint64()), ("reason", pa.string()), ("detail", pa.string()), ("measures", pa.string())])
"""Who goes: `key` is the document's place, as (number of its run) << 32 | row."""


def parts(bytes: int, memory_limit: int) -> int:
    """Chooses into how many parts of all keys so many bytes are cut."""
    return max(1, -(-bytes // memory_limit))


def conclude(flow: Flow, found: Curated, stage: GlobalStage, number: int, kind: str, judged: list[dict[str, Any]],
             **more: Any) -> list[Run]:  # fmt: skip
    """Leaves out who goes, and adds the stage's tally to `found`; returns the runs that are left.

    Records in `judged` name spills of JUDGED, and tell `clusters`, `largest` and `sizes`; `more` goes into the tally.
    """
    label, runs, names = tally.label(number, stage), found.runs, [r["judged"] for r in judged]
    shared, follows = {"names": flow.share(names)}, key(names, label)
    deciding = (Task(key(follows, i, run.name, run.decided), {"number": i, "run": run, "stage": label}, shared)
                for i, run in enumerate(runs))  # fmt: skip
    decided = flow.all(f"{kind}-decide", decide, deciding)
    for record in decided:
        found.take({**record, "runs": []})
    left = [without(run, *record["decided"]) for run, record in zip(runs, decided, strict=True)]
    part = told(flow, kind, runs, left, judged)
    for reason in stage.reasons:
        gone = sum(r["reasons"].get(f"{label}: {reason}", 0) for r in decided)
        part["dropped"] |= {reason: gone} if gone else {}
    counts = {**part["counts"], **more.pop("counts", {})}
    found.tallies.append(segment.store(flow.work.spill, {label: {**part, **more, "counts": counts}}))
    return left


def counted(sizes: Iterable[int]) -> dict[str, int]:
    """Counts clusters by their documents, for a record."""
    return {str(size): number for size, number in sorted(Counter(sizes).items())}


def told(flow: Flow, kind: str, before: list[Run], after: list[Run], clusters: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a comparing stage's part of the tally, without reasons: what came, what stayed, and the largest clusters."""
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


def without(run: Run, decided: str | None, rows: int, bytes: int) -> Run:
    """Returns a run without the rows that a spill says were decided against, if there is one."""
    return Run(run.name, run.rows - rows, run.bytes - bytes, (*run.decided, decided)) if decided else run


def decide(folder: Location, number: int, run: Run, stage: str, names: list[str]) -> dict[str, Any]:
    """Spills which documents of a run go, and tells why."""
    held = [t for n in names for t in spill.read(folder, n, number << 32, (number + 1) << 32)]
    why = {row["key"] & 0xFFFFFFFF: row for table in held for row in table.to_pylist()}
    out, gone = segment.Spiller(folder, 1), [segment.DECIDED.empty_table()]
    size = 0
    for table in survivors(folder, run, columns=["id", "bytes", "columns"]) if why else ():
        table = table.filter(pa.array(np.isin(table["row"].to_numpy(), np.array(list(why), np.uint32))))
        for row in table.to_pylist():
            about = why[row["row"]]
            measures = json.loads(about["measures"]) if about["measures"] else None
            out.leave_out(row["id"], stage, about["reason"], about["detail"], measures, row["columns"])
            size += row["bytes"]
        gone.append(table.select(segment.DECIDED.names))
    decided = [spill.write(folder, pa.concat_tables(gone), ("row",))] if why else []
    record = out.record({})
    return record | {"decided": [*decided, len(why), size] if why else [None, 0, 0], "files": [*record["files"], *decided]}
