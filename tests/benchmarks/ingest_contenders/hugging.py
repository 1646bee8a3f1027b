"""Hugging Face `datasets` streaming the same Parquet files, in Arrow format (the fastest that it has), in the consumer itself.

Its fixed pause of 5 seconds at the end of a shuffled epoch is turned off: over a long epoch it would not be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ingest_contenders.task import Task

NEEDS = "datasets"


def dataset(task: Task, rank: int, buffer: int) -> Any:
    import datasets
    from datasets.distributed import split_dataset_by_node

    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    files = [task.http(name) for name in task.files("parquet", "parquet")]
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=task.scratch)
    return split_dataset_by_node(data, rank, task.consumers).shuffle(seed=0, buffer_size=buffer).with_format("arrow")


def batches(task: Task, rank: int) -> Iterator[Any]:
    for table in dataset(task, rank, task.window // task.consumers).iter(task.batch):
        if task.kind == "tokens":
            yield table["tokens"].combine_chunks().flatten().to_numpy().reshape(-1, task.length)
        else:
            yield table["image"].to_pylist()
