"""webdataset: tar shards in random order, a shuffle buffer in each loader worker; from S3 by HTTP, as its guide does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from ingest_contenders.task import Task

NEEDS = "webdataset"


def batches(task: Task, rank: int) -> Iterator[Any]:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(task.consumers))
    import webdataset as wds

    def decode(sample: dict[str, Any]) -> Any:
        return np.frombuffer(sample["bin"], np.int32) if task.kind == "tokens" else sample["png"]

    urls = [task.http(name) for name in task.files("tar", "tar")]
    data = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node, seed=0)
        .shuffle(task.buffer)
        .map(decode)
        .batched(task.batch, collation_fn=np.stack if task.kind == "tokens" else list)
    )
    for batch in wds.WebLoader(data, batch_size=None, num_workers=task.loader_workers, persistent_workers=True):
        yield batch.numpy() if task.kind == "tokens" else batch
