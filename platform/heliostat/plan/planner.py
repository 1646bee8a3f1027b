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
from heliostat.config import spec
from heliostat.config.optimizers import STATE_BYTES
from heliostat.config.spec import Job
from heliostat.data import collection, manifest
from heliostat.errors import ConfigError, DataError, StorageError
from heliostat.plan import failures, hardware, memory, step_time
from heliostat.plan.hardware import GIB, Device
from heliostat.plan.model_stats import Activations, ModelStats, activations, build, stats_of
from heliostat.recipes.protocol import Recipe

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
    planner = Planner(job, model, kept, where, prices)
    chosen = planner.chosen()
    for one in (Planner(fewest, model, kept, where, prices), planner):  # an elastic run must fit on few, too
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
        "recommended": {k: best[k] for k in ("stage", "micro_batch", "offload_optimizer", "speed")} if best else None,
        "notes": [],
    }


def _device_of(cluster: ClusterFile) -> tuple[str | None, str | None]:
    for pool in cluster.pools:
        if pool.gpus:
            return pool.labels.get(cluster_file.ACCELERATOR), pool.instance
    return None, None


def sample(job: Job, recipe: Recipe) -> Any:
    """Returns what `recipe.batch` takes for a batch of one: zeros for tokens, else the dataset's first row."""
    if recipe.kind == "tokens":
        return np.zeros((1, job.data.sequence_length or 1), dtype=np.int32)
    import pyarrow.parquet as pq

    source = manifest.read(job.sources[0])
    shard = source.location.join(source.chunks["path"][0].as_py())
    with shard.open() as file:
        return pq.ParquetFile(file).read_row_group(0).slice(0, 1)


class Planner:
    """Estimates memory and speed of a job on a device, at its own ZeRO stage and micro-batch and at others."""

    def __init__(self, job: Job, model: ModelStats, kept: Activations, device: Device, prices: dict[str, Any]) -> None:
        self.job, self.model, self.kept, self.device, self.prices = job, model, kept, device, prices
        self.workers, self.gpu = job.workers.most, device.name != "cpu"

    def chosen(self) -> dict[str, Any]:
        """Estimates the job as it is: at its own ZeRO stage, micro-batch and offload."""
        zero = self.job.train.zero
        return self.candidate(zero.stage, self.job.train.micro_batch, bool(zero.offload.optimizer))

    def candidate(self, stage: int, micro: int, offload_optimizer: bool) -> dict[str, Any]:
        """Estimates memory, communication and speed at a ZeRO stage and micro-batch, everything else as in the job."""
        job, model, workers = self.job, self.model, self.workers
        train, precision = job.train, job.train.precision
        from heliostat.train.worker.deepspeed_engine import engine_config

        zero = engine_config(job)["zero_optimization"]
        param = train.zero.offload.param if stage == 3 else None
        threshold = zero.get("stage3_param_persistence_threshold", memory.BUCKETS["stage3_param_persistence_threshold"])
        accumulation = train.global_batch // (workers * micro)
        held = memory.state(
            model.shapes,
            model.frozen,
            workers,
            stage,
            precision,
            offload_optimizer,
            param,
            threshold,
            accumulation > 1,
            bool(train.ema),
            spec.settle(job, None).train.accumulate == "fp32",
            len(train.optimizer.state),
        )
        live = memory.working(model.parameters, model.layer, stage, precision, zero, self.gpu)
        per_sample = self.kept.checkpointed if train.activation_checkpointing else self.kept.kept
        need = memory.need(held, live, (per_sample + self.kept.largest) * micro, self.gpu, model.frozen_models)
        moved = step_time.volume(model.parameters, memory.LOW[precision], workers, stage, accumulation)
        samples = train.global_batch / workers
        done = model.flops * samples * (4 / 3 if train.activation_checkpointing else 1)  # the forward pass once more
        copied = 2 * (held.host + held.disk) if held.host or held.disk else 0
        took = step_time.step(
            done, moved, workers, self.device, self.prices["efficiency"], copied, self.prices["storage"]["host_copy"] * 1e9
        )
        per_second = train.global_batch / took.total
        return {
            "stage": stage,
            "micro_batch": micro,
            "offload_optimizer": offload_optimizer,
            "fits": need.total <= self.device.memory and need.host <= self.device.host_memory,
            "memory": {**need.dump(), "device": int(self.device.memory)},
            "communication": {"bytes_per_step": moved, "seconds_per_step": took.communicating, "exposed_s": took.exposed},
            "speed": {
                "step_s": took.total,
                "samples_per_second": per_second,
                "tokens_per_second": per_second * (job.data.sequence_length or 0),
                "mfu": model.flops * train.global_batch / took.total / (self.device.flops * workers),
            },
        }

    def recommend(self) -> dict[str, Any] | None:
        """Finds the fastest candidate that fits; None if none does.

        At equal speed it prefers no offload, then the lower stage, then the larger micro-batch.
        """
        share = self.job.train.global_batch // self.workers
        micros = [m for m in range(1, share + 1) if share % m == 0]
        stages = range(1 if self.job.train.precision == "bf16" else 0, 4)  # stage 0 in bf16 trains wrongly
        made = [self.candidate(s, m, o) for s in stages for m in micros for o in (False, True) if s or not o]
        fits = [c for c in made if c["fits"]]
        key = lambda c: (round(c["speed"]["step_s"], 3), c["offload_optimizer"], c["stage"], -c["micro_batch"])  # noqa: E731
        return min(fits, key=key, default=None)

    def checkpoint(self, chosen: dict[str, Any]) -> dict[str, float]:
        """Estimates size and times of a checkpoint, and the interval that loses least to failures."""
        rates, nodes = self.prices["storage"], -(-self.workers // self.device.per_node)
        trained = sum(math.prod(s) for s in self.model.trained.values())
        train = self.job.train
        size = (4 + STATE_BYTES * len(train.optimizer.state) + 4 * bool(train.ema)) * trained  # master, moments, average
        blocked = size / self.workers / (rates["host_copy"] * 1e9) if self.gpu else 0.1
        upload = size / nodes / (rates["node"] * 1e9)
        between = self.between()
        seconds = failures.best_interval(max(blocked, 1e-3), between, upload)
        step_s = chosen["speed"]["step_s"]
        mine = self.job.checkpoint.every * step_s
        restart = self.prices["node_failures"]["restart_s"]
        return {
            "bytes": size,
            "blocked_s": blocked,
            "upload_s": upload,
            "hours_between_failures": between / failures.HOUR,
            "every": self.job.checkpoint.every,
            "recommended_every": max(1, round(seconds / step_s)),
            "goodput": 1 - failures.waste(mine, blocked, between, restart),
            "recommended_goodput": 1 - failures.waste(max(1, round(seconds / step_s)) * step_s, blocked, between, restart),
        }

    def between(self) -> float:
        return failures.mean_time_between(
            self.prices["node_failures"]["device_hours"], self.workers * max(1, self.job.workers.gpus)
        )

    def run(self, chosen: dict[str, Any]) -> dict[str, float]:
        """Estimates the whole run: time, expected failures, energy and cost."""
        seconds = self.job.train.steps * chosen["speed"]["step_s"]
        good = max(0.01, self.checkpoint(chosen)["goodput"])
        wall = seconds / good
        hours = wall / failures.HOUR
        energy = self.device.watts * self.workers * self.prices["pue"] * hours / 1000
        return {
            "samples": self.job.train.steps * self.job.train.global_batch,
            "tokens": self.job.train.steps * self.job.train.global_batch * (self.job.data.sequence_length or 0),
            "days": wall / 86400,
            "failures": wall / self.between(),
            "goodput": good,
            "energy_kwh": energy,
            "energy_cost": energy * self.prices["energy_per_kwh"],
            "cost": self.device.hour * self.workers * hours,
        }


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
