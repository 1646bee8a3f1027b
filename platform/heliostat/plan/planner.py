"""Plans a job before anything starts: estimates the resources that the job needs, and its cost (`heliostat plan`).

`plan(job, recipe, ...)` returns plain data, which `--json` prints. If the job can't run, the function raises ConfigError with
the reason. docs/plan-method.md has formulas and sources.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from heliostat.cluster import cluster_file
from heliostat.cluster.capacity import check_pools
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.config.spec import Job
from heliostat.data import collection, manifest
from heliostat.data.content import Content, part
from heliostat.errors import ConfigError, DataError, StorageError
from heliostat.plan import count_cache, hardware, memory
from heliostat.plan.counts import Counts
from heliostat.plan.estimate import Planner
from heliostat.plan.hardware import GIB, Device, Prices
from heliostat.plan.layouts import Candidate
from heliostat.recipes.conformance import is_language_model
from heliostat.recipes.loading import make
from heliostat.recipes.protocol import CutsSamples, Recipe
from heliostat.validation import check

if TYPE_CHECKING:  # torch takes seconds to import, and cached counts don't need it
    import torch

ALONE = (
    "Prepare the dataset first. A plan of an image model needs no dataset if model.text.pretrained and "
    "model.backbone.sample_size are set"
)
CHOICES = ("stage", "micro_batch_size", "activation_checkpointing", "offload_optimizer", "speed")


def prepare(path: Path, settings: list[str] | None, cluster: ClusterFile | None = None) -> tuple[Job, Recipe, str]:
    """Loads a job file for planning. Returns the job, its recipe, and the reason why the datasets can't be read ("" if they can
    be read).

    The recipe's models don't use activation checkpointing, because `model_stats.activations` requires this. The recipe is bound
    to the datasets.
    """
    return bound(*check.check_file(path, settings, cluster))


def bound(job: Job, recipe: Recipe, unread: str = "") -> tuple[Job, Recipe, str]:
    """Prepares a checked job for planning, and binds the recipe to the datasets. Returns the same values as `prepare`. If
    `unread` contains a reason, the datasets aren't read."""
    if job.train.activation_checkpointing:
        plain = job.model_copy(update={"train": job.train.model_copy(update={"activation_checkpointing": False})})
        recipe = make(type(recipe), plain)
    if unread:
        recipe.presume(1)
        return job, recipe, unread
    try:
        for location in job.sources:
            location.probe()
        written, job = job, collection.expand(job)
        if job is not written:
            recipe = make(type(recipe), job)
        recipe.bind([manifest.read(location) for location in job.sources])
    except (DataError, StorageError) as e:
        if recipe.kind != "tokens" and recipe.presume(1) is None:  # the model's shape depends on the data
            raise type(e)(f"data.sources: a plan of {job.recipe} needs the dataset: {e}. {ALONE}") from e
        return job, recipe, "; ".join(filter(None, (str(e), recipe.assumed())))
    return job, recipe, ""


def planners(
    job: Job, recipe: Recipe, cluster: ClusterFile | None, device: str | None, prices: Prices,
    built: torch.nn.Module | None = None, exchanged: dict[int, int] | None = None, counts: list[int] | None = None,
) -> list[Planner]:  # fmt: skip
    """Counts a job's model, and returns two planners: for the job's minimum number of workers, and for its maximum.

    `built`: the recipe's model from `model_stats.build`, if it exists already. Don't use this model afterwards. `exchanged`: the
    result of `ranking.degrees`; None means only the job's own sequence parallelism. `counts`: numbers of workers to plan for,
    instead of the job's own minimum and maximum.
    """
    job = sized(job, recipe)
    numbers = counts or job.worker_counts()
    most, fewest = job.on(numbers[-1]), job.on(numbers[0])
    name, instance = _device_of(cluster) if cluster and not device else (device, None)
    where = hardware.resolve(most, prices, name, instance)
    if where.name == "cpu" and (cluster is None or cluster.local):
        where = replace(where, memory=psutil.virtual_memory().total / most.workers.most)  # uses this machine's memory
    if cluster:
        check_pools(most, cluster)
    counted, parts = count_cache.get(most, recipe, lambda: _count(most, recipe, built)), job.train.parallel.sequence
    selects = recipe.selects and counted.kept.singly
    if exchanged is None:
        exchanged = {parts: recipe.exchanged(parts) if isinstance(recipe, CutsSamples) and parts > 1 else 0}
    return [Planner(one, counted, where, prices, exchanged, selects) for one in (fewest, most)]


def sized(job: Job, recipe: Recipe) -> Job:
    """Returns the job with the tokens per sample of a language model that takes this number from its datasets. A plan assumes
    that all samples have this length."""
    if job.data.sequence_length or not is_language_model(recipe):
        return job
    return job.model_copy(update={"data": job.data.model_copy(update={"sequence_length": getattr(recipe, "length", None)})})


def _count(job: Job, recipe: Recipe, built: torch.nn.Module | None) -> Counts:
    from heliostat.plan import model_stats

    return model_stats.count(job, recipe, built, [sample(job, recipe, rows) for rows in (1, 2, 3)])


def plan(
    job: Job, recipe: Recipe, cluster: ClusterFile | None = None, device: str | None = None, prices: Prices | None = None,
    built: torch.nn.Module | None = None,
) -> dict[str, object]:  # fmt: skip
    """Plans a job: memory, communication, speed, cost, and checkpoints. Raises ConfigError with the reason if the job can't
    run.

    `built`: the recipe's model from `model_stats.build`, if it exists already. Don't use this model afterwards.
    """
    job = sized(job, recipe)
    both = planners(job, recipe, cluster, device, prices or hardware.table(), built)
    for one in both:  # an elastic run must also fit on its minimum number of workers
        if not (mine := one.chosen()).fits:
            raise ConfigError(_refusal(one.job, one.device, mine, one.recommend()))
    planner = both[-1]
    chosen, best, model = planner.chosen(), planner.recommend(), planner.model
    return {
        **facts(planner),
        "memory": chosen.memory,
        "flops": {"per_sample": model.flops, "per_token": model.flops / (job.data.sequence_length or 1)},
        "communication": chosen.communication,
        "speed": chosen.speed,
        "parts": chosen.parts,
        "run": planner.run(chosen),
        "checkpoint": planner.checkpoint(chosen),
        "recommended": {k: v for k, v in best.dump().items() if k in CHOICES} if best else None,
        "notes": [],
    }


def facts(planner: Planner) -> dict[str, object]:
    """Describes the planned job, its model, and its device."""
    model = planner.model
    return {
        "name": planner.job.name,
        "device": {**asdict(planner.device), "prices": str(planner.prices["date"])},
        "workers": planner.workers,
        "parameters": {
            "total": model.parameters,
            "active": model.active,
            "trained": sum(math.prod(s) for s in model.trained.values()),
        },
    }


def _device_of(cluster: ClusterFile) -> tuple[str | None, str | None]:
    for pool in cluster.pools:
        if pool.gpus:
            return pool.labels.get(cluster_file.ACCELERATOR), pool.instance
    return None, None


def sample(job: Job, recipe: Recipe, rows: int = 1) -> Content:
    """Returns an input of `recipe.batch` for `rows` samples. For tokens, the input is zeros. For other data, the input is the
    rows that the recipe presumes, or copies of the dataset's first row."""
    if recipe.kind == "tokens":
        return np.zeros((rows, job.data.sequence_length or 1), dtype=np.int32)
    if (presumed := recipe.presume(rows)) is not None:
        return presumed
    import pyarrow as pa

    from heliostat.data.chunks import Chunks

    first = part(Chunks([manifest.read(job.sources[0])], None).read(0, 0), slice(0, 1))
    return pa.concat_tables([first] * rows).combine_chunks()


def _refusal(job: Job, device: Device, chosen: Candidate, best: Candidate | None) -> str:
    need = chosen.memory
    if need["total"] > device.memory:
        what = f"needs {need['total'] / GIB:.1f} GiB ({memory.parts(need)}), but {device.name} has {device.memory / GIB:.0f} GiB"
    else:
        share = f"a worker's share is {device.host_memory / GIB:.0f} GiB"
        what = f"needs {need['host'] / GIB:.1f} GiB of host memory for offload and batches, but {share}"
    more = "activation_checkpointing: true, " if not job.train.activation_checkpointing else ""
    fitting = best.layout if best else None
    replays = fitting and str(fitting.checkpointing) != str(job.train.activation_checkpointing)
    way = (
        f"the job fits with train.zero.stage {fitting.stage}, train.micro_batch_size {fitting.micro_batch_size}"
        + (", train.zero.offload.optimizer cpu" if fitting.offload_optimizer else "")
        + (f", train.activation_checkpointing {str(fitting.checkpointing).lower()}" if replays else "")
        if fitting
        else (
            f"no ZeRO stage and micro-batch size fits on {job.workers.most} workers. "
            f"Use {more}more workers, offload, or a smaller model"
        )
    )
    sums = (
        ". To avoid the sums in fp32, set train.grad_accum_dtype: same"
        if need["summed"] and need["total"] > device.memory
        else ""
    )
    speed = f"with enough memory, a step would take {chosen.speed['step_s']:.3g} s (MFU {chosen.speed['mfu']:.1%})"
    where = f"train.zero.stage {chosen.layout.stage}, train.micro_batch_size {chosen.layout.micro_batch_size}"
    return f"{where}: each worker {what}; {way}{sums}; {speed}"
