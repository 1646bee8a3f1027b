"""Defines the contenders of `ingest.py`, by the names of CONTENDERS.

`batches(task, rank)` yields the batches of one consumer. If the consumers are Ray actors, `split(task)` makes the dataset and
returns each consumer's part, which `batches` takes as its third argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from tests.benchmarks.ingest_contenders.task import Task


@dataclass(frozen=True)
class Contender:
    label: str
    needs: str  # the package without which it is left out
    batches: Callable[..., Iterator[Any]]
    split: Callable[[Task], list[Any]] | None = None


@lru_cache(maxsize=1)
def planned(task: Task) -> tuple[Any, Any, Any, int]:
    """Returns (job, data plan, order, bytes of a sample) of a run that takes each sample once: without evaluation, with one
    virtual rank per consumer."""
    from heliostat import schema
    from heliostat.config.spec import Job
    from heliostat.data import dataset, manifest

    mark = f"?endpoint_override={task.endpoint}&scheme=http" if task.endpoint else ""
    length, batch = task.length if task.kind == "tokens" else None, task.batch * task.consumers
    source = {"path": f"{task.folder}/parquet{mark}", "max_epochs": 1.0}
    given = {
        "name": "ingest", "recipe": "none:None", "model": {}, "checkpoint": {"every": 1}, "workers": {"count": task.consumers},
        "data": {"sources": [source], "sequence_length": length, "shuffle_window": task.window},
        "train": {"steps": task.samples // batch, "global_batch_size": batch, "micro_batch_size": task.batch,
                  "optimizer": {"lr": 1e-3}},
        "storage": task.scratch, "mlflow": {"uri": "sqlite:///none.db", "experiment": "none"},
    }  # fmt: skip
    job = schema.validate(Job, given, "ingest")
    manifests = [manifest.read(location) for location in job.sources]
    plan = dataset.plan(job, manifests)
    return job, plan, dataset.make_order(plan, manifests), dataset.sample_bytes(job.data.sequence_length, manifests)


def our_split(task: Task) -> list[Any]:
    """Returns the run's own plan, fetch tasks, split, and worker-side stream, assembled like in `training/worker/build.py`."""
    from heliostat.data import stream

    job, plan, order, size = planned(task)
    fetch = stream.fetch(plan, order, 0, job.train.steps, replace=True)
    data = stream.dataset(fetch, max(2, task.consumers), job.data.memory_limit, size)
    return stream.split(data, task.consumers)


def ours(task: Task, rank: int, shard: Any) -> Iterator[Any]:
    from heliostat.data import stream

    job, plan, order, _ = planned(task)
    samples = stream.iterate(shard, plan, order, rank, task.consumers, 0)
    for _ in range(job.train.steps):
        content = samples.next_step().content
        yield content if task.kind == "tokens" else content["image"].to_pylist()


def values(task: Task, column: Any) -> Any:
    """Returns the samples of an Arrow column."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, task.length) if task.kind == "tokens" else column.to_pylist()


def arrow_loop(task: Task, rank: int) -> Iterator[Any]:
    """Yields the reference: a plain loop over the Parquet files with pyarrow, in file order, without a shuffle."""
    import pyarrow.parquet as pq

    fs = task.filesystem()
    for name in task.files("parquet", "parquet")[rank :: task.consumers]:
        file = pq.ParquetFile(fs.open_input_file(task.path(name)), pre_buffer=True)
        for group in range(file.num_row_groups):
            rows = values(task, file.read_row_group(group, columns=task.columns)[task.columns[0]])
            for start in range(0, len(rows), task.batch):
                yield rows[start : start + task.batch]


def mosaic(task: Task, rank: int) -> Iterator[Any]:
    """Yields from MDS shards with shuffle py1e over blocks of a window. From S3, each run downloads the shards to an empty
    cache."""
    world = {"WORLD_SIZE": str(task.consumers), "LOCAL_WORLD_SIZE": str(task.consumers), "MASTER_PORT": os.environ["INGEST_PORT"]}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", **world)
    if task.endpoint:
        os.environ["S3_ENDPOINT_URL"] = f"http://{task.endpoint}"
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    folder = f"{task.folder}/mds"
    where = {"remote": folder, "local": f"{task.scratch}/mds"} if task.endpoint else {"local": folder}
    shuffle = {"shuffle": True, "shuffle_algo": "py1e", "shuffle_block_size": task.window, "num_canonical_nodes": 1}
    data = StreamingDataset(**where, **shuffle, batch_size=task.batch, predownload=task.window)
    collate = None if task.kind == "tokens" else list
    workers = {"num_workers": task.loader_workers, "persistent_workers": True}
    for batch in DataLoader(data, batch_size=task.batch, collate_fn=collate, **workers):
        yield batch["tokens"].numpy() if task.kind == "tokens" else [sample["image"] for sample in batch]


def tars(task: Task, rank: int) -> Iterator[Any]:
    """Yields from tar shards in random order, with a shuffle buffer in each loader worker; from S3 by HTTP, as in webdataset's
    guide."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(task.consumers))
    import webdataset as wds

    def decode(sample: dict[str, Any]) -> Any:
        return np.frombuffer(sample["bin"], np.int32) if task.kind == "tokens" else sample["png"]

    urls = [task.http(name) for name in task.files("tar", "tar")]
    data = wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node, seed=0).shuffle(task.buffer).map(decode)
    data = data.batched(task.batch, collation_fn=np.stack if task.kind == "tokens" else list)
    for batch in wds.WebLoader(data, batch_size=None, num_workers=task.loader_workers, persistent_workers=True):
        yield batch.numpy() if task.kind == "tokens" else batch


def hugging(task: Task, rank: int, loader: bool) -> Iterator[Any]:
    """Streams the same Parquet files with `datasets` in Arrow format (its fastest): in the consumer itself, or in the worker
    processes of a DataLoader.

    Its pause of 5 seconds at the end of a shuffled epoch is off.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node
    from torch.utils.data import DataLoader

    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    files = [task.http(name) for name in task.files("parquet", "parquet")]
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=task.scratch)
    buffer = task.buffer if loader else task.window // task.consumers
    data = split_dataset_by_node(data, rank, task.consumers).shuffle(seed=0, buffer_size=buffer).with_format("arrow")
    if not loader:
        yield from (values(task, table[task.columns[0]]) for table in data.iter(task.batch))
        return
    workers = {"num_workers": task.loader_workers, "persistent_workers": True}
    for table in DataLoader(data.batch(task.batch), batch_size=None, **workers):
        column = table[task.columns[0]].combine_chunks().flatten()
        yield column.flatten().to_numpy().reshape(-1, task.length) if task.kind == "tokens" else column.to_pylist()


def ray_split(task: Task) -> list[Any]:
    """Uses plain Ray Data: read_parquet, shuffled files, streaming_split, and a local shuffle buffer in each consumer."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.use_datasource_v2 = False  # V2 takes seconds longer to its first batch
    files = [task.path(name) for name in task.files("parquet", "parquet")]
    data = ray.data.read_parquet(files, filesystem=task.filesystem(), columns=task.columns, shuffle="files")
    return data.streaming_split(task.consumers, equal=False)


def ray_data(task: Task, rank: int, shard: Any) -> Iterator[Any]:
    shuffle = {"local_shuffle_buffer_size": task.window // task.consumers, "local_shuffle_seed": 0}
    for batch in shard.iter_batches(batch_size=task.batch, batch_format="pyarrow", prefetch_batches=4, **shuffle):
        yield values(task, batch[task.columns[0]])


CONTENDERS = {
    "ours": Contender("heliostat", "heliostat", ours, our_split),
    "arrow_loop": Contender("pyarrow loop, not shuffled", "pyarrow", arrow_loop),
    "mosaic": Contender("mosaicml-streaming py1e", "streaming", mosaic),
    "tars": Contender("webdataset", "webdataset", tars),
    "hugging": Contender("datasets streaming, no loader", "datasets", partial(hugging, loader=False)),
    "hugging_loader": Contender("datasets streaming, DataLoader", "datasets", partial(hugging, loader=True)),
    "ray_data": Contender("Ray Data, local shuffle", "ray", ray_data, ray_split),
}
