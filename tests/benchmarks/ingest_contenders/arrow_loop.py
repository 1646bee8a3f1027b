"""The yardstick: a plain loop over the Parquet files with pyarrow, in file order. It does not shuffle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from ingest_contenders.task import Task

NEEDS = "pyarrow"


def batches(task: Task, rank: int) -> Iterator[Any]:
    fs = task.filesystem()
    column = "tokens" if task.kind == "tokens" else "image"
    for name in task.files("parquet", "parquet")[rank :: task.consumers]:
        file = pq.ParquetFile(fs.open_input_file(task.path(name)), pre_buffer=True)
        for group in range(file.num_row_groups):
            values = file.read_row_group(group, columns=[column] if task.kind == "tokens" else [column, "caption"])[column]
            if task.kind == "tokens":
                rows = values.combine_chunks().flatten().to_numpy().reshape(-1, task.length)
            else:
                rows = values.to_pylist()
            for start in range(0, len(rows), task.batch):
                yield rows[start : start + task.batch]
