"""mosaicml-streaming: MDS shards, shuffle py1e over blocks of a window, a DataLoader in each rank.

From S3 each run downloads the shards into an empty cache, as a first epoch on a fresh machine does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ingest_contenders.task import Task

NEEDS = "streaming"


def batches(task: Task, rank: int) -> Iterator[Any]:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(task.consumers),
        LOCAL_WORLD_SIZE=str(task.consumers),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=os.environ["INGEST_PORT"],
    )
    if task.endpoint:
        os.environ["S3_ENDPOINT_URL"] = f"http://{task.endpoint}"
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    folder = f"{task.folder}/mds"
    where = {"remote": folder, "local": f"{task.scratch}/mds"} if task.endpoint else {"local": folder}
    data = StreamingDataset(
        **where,
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_block_size=task.window,
        num_canonical_nodes=1,
        batch_size=task.batch,
        predownload=task.window,
    )
    loader = DataLoader(
        data,
        batch_size=task.batch,
        num_workers=task.loader_workers,
        persistent_workers=True,
        collate_fn=None if task.kind == "tokens" else list,
    )
    for batch in loader:
        yield batch["tokens"].numpy() if task.kind == "tokens" else [sample["image"] for sample in batch]
