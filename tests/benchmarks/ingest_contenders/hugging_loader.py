"""Hugging Face `datasets` as in `hugging`, but in the worker processes of a DataLoader, which send whole batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ingest_contenders.hugging import dataset
from ingest_contenders.task import Task

NEEDS = "datasets"


def batches(task: Task, rank: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    data = dataset(task, rank, task.buffer).batch(task.batch)
    for table in DataLoader(data, batch_size=None, num_workers=task.loader_workers, persistent_workers=True):
        column = table["tokens" if task.kind == "tokens" else "image"].combine_chunks().flatten()
        yield column.flatten().to_numpy().reshape(-1, task.length) if task.kind == "tokens" else column.to_pylist()
