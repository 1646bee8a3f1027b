"""heliostat: the run's own plan, fetch tasks, split and worker-side stream, as `training/worker/loop.py` puts them together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from ingest_contenders.task import Task

NEEDS = "heliostat"
RAY = True


@lru_cache(maxsize=1)
def planned(task: Task) -> tuple[Any, Any, Any, int]:
    """(job, data plan, order, bytes of a sample) of a run that takes each sample once: no evaluation, a lane a consumer."""
    from heliostat import schema
    from heliostat.config.spec import Job
    from heliostat.data import dataset, manifest

    mark = f"?endpoint_override={task.endpoint}&scheme=http" if task.endpoint else ""
    job = schema.validate(
        Job,
        {
            "name": "ingest",
            "recipe": "none:None",
            "model": {},
            "data": {
                "sources": [{"path": f"{task.folder}/parquet{mark}", "max_epochs": 1.0}],
                "sequence_length": task.length if task.kind == "tokens" else None,
                "window": task.window,
            },
            "train": {
                "steps": task.samples // (task.batch * task.consumers),
                "global_batch": task.batch * task.consumers,
                "micro_batch": task.batch,
                "optimizer": {"lr": 1e-3},
            },
            "checkpoint": {"every": 1},
            "workers": {"count": task.consumers},
            "storage": task.scratch,
            "mlflow": {"uri": "sqlite:///none.db", "experiment": "none"},
        },
        "ingest",
    )
    manifests = [manifest.read(location) for location in job.sources]
    plan = dataset.plan(job, manifests)
    return job, plan, dataset.make_order(plan, manifests), dataset.sample_bytes(job.data.sequence_length, manifests)


def split(task: Task) -> list[Any]:
    from heliostat.data import stream

    job, plan, order, size = planned(task)
    fetch = stream.fetch(plan, order, 0, job.train.steps, replace=True)
    data = stream.dataset(fetch, max(2, task.consumers), job.data.memory_limit, size)
    return stream.split(data, task.consumers)


def batches(task: Task, rank: int, shard: Any) -> Iterator[Any]:
    from heliostat.data import stream

    job, plan, order, _ = planned(task)
    samples = stream.iterate(shard, plan, order, rank, task.consumers, 0)
    for _ in range(job.train.steps):
        content = samples.next_step().content
        yield content if task.kind == "tokens" else content["image"].to_pylist()
