"""Derives the records of an image pipeline's tasks from measured records: shards, lists of URLs, and metadata files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from heliostat.curation.images.sampling import RATE
from heliostat.curation.images.sources import FILES_PER_TASK
from heliostat.curation.pieces import FilePart
from heliostat.curation.simulation.requests import named
from heliostat.curation.web import lists
from heliostat.data.row_groups import RowGroupColumns
from heliostat.tasks import spill
from heliostat.tasks.clusters import Task


def fetched(task: Task) -> dict[str, Any] | None:
    """Returns the description of a task that fetches URLs (`lists.plan`); None for other tasks."""
    part = task.arguments.get("piece", [None])[0]
    description = json.loads(part.description) if isinstance(part, FilePart) and part.description else {}
    return description if description.get("kind") == "urls" else None


def list_bytes(description: Mapping[str, Any]) -> int:
    """Returns the bytes of the rows whose URLs a task fetches. A task of a sample fetches only a share."""
    return round(description["bytes"] * description.get(RATE, 1.0))


def lists_record(record: dict[str, Any], key: str, growth: float) -> dict[str, Any]:
    """Returns the record of a task that reads a list, from the record of a list that is `1 / growth` as large."""
    sums = np.floor(np.cumsum(lists.unpacked(record["counts"])) * growth + 0.5).astype(np.int64)  # so that the total is right
    rows, bytes = int(sums[-1]), round(sum(run[2] for run in record["runs"]) * growth)
    count, stored = max(1, -(-rows // lists.SPILLED)), sum(spill.size_of(run[0]) or 0 for run in record["runs"])
    runs = [[named(f"{key} list {i}", round(stored * growth / count)), rows // count, bytes // count] for i in range(count)]
    return {**record, "counts": lists.packed(np.diff(sums, prepend=0)), "runs": runs, "files": [name for name, *_ in runs]}


def shard_record(measured: dict[str, Any], task: Task, growth: float) -> dict[str, Any]:
    """Returns the record of a task that writes a shard of images."""
    images, groups = round(measured["images"] * growth), measured.get("row_groups")
    count = max(1, round(images / task.arguments["chunk_images"]))
    path = f"{task.arguments['prefix']}{task.key[:16]}.parquet"
    size = round(measured["file_bytes"] * growth)
    ends = [named(f"{task.key} {name}", round((spill.size_of(name) or 0) * growth)) for name in measured["ends"]]
    record = {**measured, "file_bytes": size, "images": images, "ends": ends, "files": ends}
    return (
        record | {"path": path, "row_groups": like_first(groups, count) | {"rows": [images // count] * count}}
        if groups
        else record
    )


def like_first(measured: RowGroupColumns, count: int) -> dict[str, list[Any]]:
    """Returns `count` row groups like the first measured one."""
    columns = cast("dict[str, list[Any]]", measured)
    return {name: values[:1] * count for name, values in columns.items()}


def metadata_record(task: Task, listed: list[tuple[Any, ...]]) -> dict[str, Any]:
    """Returns the descriptions of the tasks that read the files in a metadata file. `listed`: the files in its folder."""
    sizes = [fields[1] for fields in listed]
    groups = [sizes[at : at + FILES_PER_TASK] for at in range(0, len(sizes), FILES_PER_TASK)]
    parts = [[f"{task.key[:2]}/{task.key[:24]}{number:08x}-{100 * len(some)}.json", sum(some), ""]
             for number, some in enumerate(groups)]  # fmt: skip
    return {"parts": parts, "files": [name for name, *_ in parts]}
