"""Plans a job before anything starts: what it needs and what it will cost (`heliostat plan`).

`plan(job, recipe, ...)` returns plain data (what `--json` prints) or raises ConfigError with the reason why the job cannot run.
docs/plan.md has formulas and sources.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import heliostat.check as check
from heliostat.cluster import cluster_file
from heliostat.cluster import pools as room
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.config.spec import Job
from heliostat.data import collection, manifest
from heliostat.errors import ConfigError, DataError, StorageError
from heliostat.plan import hardware
from heliostat.plan.estimate import Planner
from heliostat.plan.hardware import GIB, Device
from heliostat.plan.model_stats import activations, build, stats_of, work
from heliostat.recipes.protocol import Recipe

CHOICES = ("stage", "micro_batch", "activation_checkpointing", "offload_optimizer")
log = logging.getLogger(__name__)


def plan_file(
    path: Path,
    settings: list[str] | None = None,
    cluster: Path | None = None,
    device: str | None = None,
    prices: Path | None = None,
) -> dict[str, Any]:
    """Plans the job of a job file; its datasets are looked at if they can be reached."""
    job, recipe, unread = prepare(path, settings)
    found = plan(job, recipe, cluster_file.read(cluster) if cluster else None, device, hardware.table(prices))
    if unread:
        found["notes"].append(f"the datasets were not looked at: {unread}")
    return found


def prepare(path: Path, settings: list[str] | None) -> tuple[Job, Recipe, str]:
    """Loads a job file for planning: the job, its recipe, and the reason why the datasets cannot be read ("" if they can).

    The recipe's models do not checkpoint activations (`model_stats.activations` needs that), and it knows the datasets.
    """
    job, recipe = check.check_file(path, settings)
    if job.train.activation_checkpointing:
        recipe = type(recipe)(job.model_copy(update={"train": job.train.model_copy(update={"activation_checkpointing": False})}))
    try:
        for location in job.sources:
            location.probe()
        given, job = job, collection.expand(job)
        if job is not given:
            recipe = type(recipe)(job)
        recipe.bind([manifest.read(location) for location in job.sources])
    except (DataError, StorageError) as e:
        if recipe.kind != "tokens":  # the model's shape follows from the data
            raise type(e)(f"data.sources: a plan of {job.recipe} needs the dataset: {e}") from e
        return job, recipe, str(e)
    return job, recipe, ""


def plan(
    job: Job, recipe: Recipe, cluster: ClusterFile | None = None, device: str | None = None, prices: dict[str, Any] | None = None,
    built: torch.nn.Module | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Plans a job: memory, communication, speed, cost, checkpoints; ConfigError with the reason if it cannot run.

    `built`: the recipe's model from `model_stats.build`, if there is one; it cannot be used afterwards.
    """
    prices = prices or hardware.table()
    job, fewest = job.on(job.worker_counts()[-1]), job.on(job.worker_counts()[0])
    name, instance = _device_of(cluster) if cluster and not device else (device, None)
    where = hardware.resolve(job, prices, name, instance)
    if where.name == "cpu" and (cluster is None or cluster.local):
        where = replace(where, memory=psutil.virtual_memory().total / job.workers.most)  # this machine's
    if cluster:
        room.check(job, cluster)
    built = built or build(recipe)
    model = stats_of(recipe, built)
    kept = activations(job, recipe, built, sample(job, recipe), count=not model.flops)
    model = replace(model, flops=model.flops or kept.flops)
    operations = work(job, recipe, built, (sample(job, recipe), sample(job, recipe, 2)))
    planner = Planner(job, model, kept, operations, where, prices)
    chosen = planner.chosen()
    for one in (Planner(fewest, model, kept, operations, where, prices), planner):  # an elastic run must fit on few, too
        if not (mine := one.chosen())["fits"]:
            raise ConfigError(_refusal(one.job, where, mine, one.recommend()))
    best = planner.recommend()
    return {
        "name": job.name,
        "device": {**asdict(where), "prices": str(prices["date"])},
        "workers": job.workers.most,
        "parameters": {"total": model.parameters, "trained": sum(math.prod(s) for s in model.trained.values())},
        "memory": chosen["memory"],
        "flops": {"per_sample": model.flops, "per_token": model.flops / (job.data.sequence_length or 1)},
        "communication": chosen["communication"],
        "speed": chosen["speed"],
        "run": planner.run(chosen),
        "checkpoint": planner.checkpoint(chosen),
        "recommended": {k: best[k] for k in (*CHOICES, "speed")} if best else None,
        "notes": [],
    }


def _device_of(cluster: ClusterFile) -> tuple[str | None, str | None]:
    for pool in cluster.pools:
        if pool.gpus:
            return pool.labels.get(cluster_file.ACCELERATOR), pool.instance
    return None, None


def sample(job: Job, recipe: Recipe, rows: int = 1) -> Any:
    """Returns what `recipe.batch` takes for so many samples: zeros for tokens, else the dataset's first row."""
    if recipe.kind == "tokens":
        return np.zeros((rows, job.data.sequence_length or 1), dtype=np.int32)
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = manifest.read(job.sources[0])
    shard = source.location.join(source.chunks["path"][0].as_py())
    with shard.open() as file:
        first = pq.ParquetFile(file).read_row_group(0).slice(0, 1)
    return pa.concat_tables([first] * rows).combine_chunks()


def _refusal(job: Job, device: Device, chosen: dict[str, Any], best: dict[str, Any] | None) -> str:
    need = chosen["memory"]
    parts = ", ".join(
        f"{k} {need[k] / GIB:.1f}"
        for k in ("weights", "gradients", "optimizer", "working", "activations", "frozen", "margin")
        if need[k] or k != "frozen"
    )
    if need["total"] > device.memory:
        what = f"needs {need['total'] / GIB:.1f} GiB ({parts}), and {device.name} has {device.memory / GIB:.0f}"
    else:
        share = f"a worker's share is {device.host_memory / GIB:.0f}"
        what = f"needs {need['host'] / GIB:.1f} GiB of host memory for offload, and {share}"
    more = "activation_checkpointing: true, " if not job.train.activation_checkpointing else ""
    way = (
        f"it fits with train.zero.stage {best['stage']}, train.micro_batch {best['micro_batch']}"
        + (", train.zero.offload.optimizer cpu" if best["offload_optimizer"] else "")
        if best
        else f"no stage and micro-batch fits on {job.workers.most} workers; use {more}more workers, offload, or a smaller model"
    )
    return f"train.zero.stage {chosen['stage']}, train.micro_batch {chosen['micro_batch']}: each worker {what}; {way}"
