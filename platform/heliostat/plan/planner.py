"""Plans a job before anything starts: what it needs and what it will cost (`heliostat plan`).

`plan(job, recipe, ...)` returns plain data (what `--json` prints) or raises ConfigError with the reason why the job cannot run.
docs/plan.md has formulas and sources.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

import heliostat.check as check
from heliostat.cluster import cluster_file
from heliostat.cluster import pools as room
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.config import schema
from heliostat.config.spec import Job
from heliostat.config.worker_counts import divisors
from heliostat.data import collection, manifest
from heliostat.errors import ConfigError, DataError, StorageError
from heliostat.plan import calibrate, count_cache, hardware, layouts
from heliostat.plan.counts import Counts
from heliostat.plan.estimate import Planner
from heliostat.plan.hardware import GIB, Device
from heliostat.recipes.protocol import CutsSamples, Recipe
from heliostat.storage import Location

if TYPE_CHECKING:  # torch takes seconds, and a model that was counted before needs none
    import torch

CHOICES = ("stage", "micro_batch", "activation_checkpointing", "offload_optimizer")
log = logging.getLogger(__name__)


def plan_file(
    path: Path,
    settings: list[str] | None = None,
    cluster: Path | None = None,
    device: str | None = None,
    prices: Path | None = None,
    run: Location | None = None,
    write: Path | None = None,
    rank: bool = False,
) -> dict[str, Any]:
    """Plans the job of a job file; its datasets are looked at if they can be reached.

    `run`: a measured run that the device's efficiencies are taken from, and `write` the file that gets them. `rank`: all layouts
    instead of the job's own.
    """
    table, pools = hardware.table(prices), cluster_file.read(cluster) if cluster else None
    job, recipe, unread = prepare(path, settings)  # last: it asks the stores of the datasets
    notes = [f"the datasets were not looked at: {unread}"] if unread else []
    if run:
        table, note = calibrated(run, table, pools, device, write)
        notes.append(note)
    found = (ranking if rank else plan)(job, recipe, pools, device, table)
    found["notes"] += notes
    return found


def calibrated(
    run: Location, prices: dict[str, Any], cluster: ClusterFile | None, device: str | None, write: Path | None
) -> tuple[dict[str, Any], str]:
    """Plans a run's own job and corrects the efficiencies of its device by what it measured; returns them in the price table."""
    said = calibrate.measured(run)
    job, recipe, _ = _prepared(*check.check_job(said.job))
    planner = planners(job, recipe, cluster, device, prices)[-1]
    planned, name = planner.chosen(), planner.device.name
    efficiency = calibrate.corrected(planner.device.efficiency, planned, said.step_s)
    if write:
        calibrate.write(write, name, efficiency, run, said)
    note = (
        f"{name} as measured in {run}: {said.step_s:.3g} s a step over {said.steps} steps, where the plan said "
        f"{planned['speed']['step_s']:.3g}" + (f"; written to {write}" if write else "")
    )
    return calibrate.laid_over(prices, name, efficiency), note


def prepare(path: Path, settings: list[str] | None) -> tuple[Job, Recipe, str]:
    """Loads a job file for planning: the job, its recipe, and the reason why the datasets cannot be read ("" if they can).

    The recipe's models do not checkpoint activations (`model_stats.activations` needs that), and it knows the datasets.
    """
    return _prepared(*check.check_file(path, settings))


def _prepared(job: Job, recipe: Recipe) -> tuple[Job, Recipe, str]:
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


def planners(
    job: Job, recipe: Recipe, cluster: ClusterFile | None, device: str | None, prices: dict[str, Any],
    built: torch.nn.Module | None = None, exchanged: dict[int, int] | None = None,
) -> list[Planner]:  # fmt: skip
    """Counts a job's model, and returns a planner for the fewest workers that the job may have and one for the most.

    `built`: the recipe's model from `model_stats.build`, if there is one; it cannot be used afterwards. `exchanged`: as `degrees`
    gives it; None: of the job's own degree alone.
    """
    most, fewest = job.on(job.worker_counts()[-1]), job.on(job.worker_counts()[0])
    name, instance = _device_of(cluster) if cluster and not device else (device, None)
    where = hardware.resolve(most, prices, name, instance)
    if where.name == "cpu" and (cluster is None or cluster.local):
        where = replace(where, memory=psutil.virtual_memory().total / most.workers.most)  # this machine's
    if cluster:
        room.check(most, cluster)
    counts, parts = count_cache.get(most, recipe, lambda: _count(most, recipe, built)), job.train.parallel.sequence
    selects = recipe.selects and counts.kept.singly
    if exchanged is None:
        exchanged = {parts: recipe.exchanged(parts) if isinstance(recipe, CutsSamples) and parts > 1 else 0}
    return [Planner(one, counts, where, prices, exchanged, selects) for one in (fewest, most)]


def degrees(job: Job, recipe: Recipe) -> dict[int, int]:
    """Finds how many workers could share a sample (`train.parallel.sequence`), with the elements that each would then send.

    An elastic job's degrees are those that its fewest workers and its most can have, too.
    """
    found = dict[int, int]()
    for parts in divisors(math.gcd(job.worker_counts()[0], job.worker_counts()[-1])):
        raw = job.dump()
        raw["train"] |= {"parallel": {**raw["train"]["parallel"], "sequence": parts}, "micro_batch": 1}
        try:
            schema.validate(Job, raw, job.name)
            found[parts] = _exchanged(recipe, parts)
        except ConfigError as e:
            log.debug("%d workers cannot share a sample: %s", parts, e)
    return found


def _exchanged(recipe: Recipe, parts: int) -> int:
    """Counts what each of the workers that share a sample would send; ConfigError if they cannot share one."""
    if parts == 1:
        return 0
    if not isinstance(recipe, CutsSamples):
        raise ConfigError(f"train.parallel.sequence: {type(recipe).__name__} cuts no samples")
    recipe.require_cut(parts)
    return recipe.exchanged(parts)


def _count(job: Job, recipe: Recipe, built: torch.nn.Module | None) -> Counts:
    from heliostat.plan import model_stats

    return model_stats.count(job, recipe, built, [sample(job, recipe, rows) for rows in (1, 2, 3)])


def plan(
    job: Job, recipe: Recipe, cluster: ClusterFile | None = None, device: str | None = None, prices: dict[str, Any] | None = None,
    built: torch.nn.Module | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Plans a job: memory, communication, speed, cost, checkpoints; ConfigError with the reason if it cannot run.

    `built`: the recipe's model from `model_stats.build`, if there is one; it cannot be used afterwards.
    """
    both = planners(job, recipe, cluster, device, prices or hardware.table(), built)
    for one in both:  # an elastic run must fit on few, too
        if not (mine := one.chosen())["fits"]:
            raise ConfigError(_refusal(one.job, one.device, mine, one.recommend()))
    planner = both[-1]
    chosen, best, model = planner.chosen(), planner.recommend(), planner.model
    return {
        **_facts(planner),
        "memory": chosen["memory"],
        "flops": {"per_sample": model.flops, "per_token": model.flops / (job.data.sequence_length or 1)},
        "communication": chosen["communication"],
        "speed": chosen["speed"],
        "parts": chosen["parts"],
        "run": planner.run(chosen),
        "checkpoint": planner.checkpoint(chosen),
        "recommended": {k: best[k] for k in (*CHOICES, "speed")} if best else None,
        "notes": [],
    }


def ranking(
    job: Job, recipe: Recipe, cluster: ClusterFile | None = None, device: str | None = None, prices: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Ranks the layouts in which a job could train, by time within memory, each with why it is not the best.

    A layout of an elastic job must fit on its fewest workers, too.
    """
    shared = degrees(job, recipe)
    fewest, planner = planners(job, recipe, cluster, device, prices or hardware.table(), exchanged=shared)
    made = []
    for given in layouts.candidates(planner.job, planner.workers, shared, planner.selects):
        for layout in (given, *fewest.partly(given)):
            few = fewest.candidate(layout)
            made.append(planner.candidate(layout) if few["fits"] else few)
    found = layouts.ranked(made)
    return {
        **_facts(planner),
        "layouts": [{**one, "layout": one["layout"].settings()} for one in found],
        "set": layouts.changes(job, found[0]["layout"]) if found[0]["fits"] else None,
        "notes": [],
    }


def _facts(planner: Planner) -> dict[str, Any]:
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


def sample(job: Job, recipe: Recipe, rows: int = 1) -> Any:
    """Returns what `recipe.batch` takes for so many samples: zeros for tokens, else the dataset's first row."""
    if recipe.kind == "tokens":
        return np.zeros((rows, job.data.sequence_length or 1), dtype=np.int32)
    import pyarrow as pa

    from heliostat.data.chunks import Chunks

    first = Chunks([manifest.read(job.sources[0])], None).read(0, 0).slice(0, 1)
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
    replays = best and str(best["activation_checkpointing"]) != str(job.train.activation_checkpointing)
    way = (
        f"it fits with train.zero.stage {best['stage']}, train.micro_batch {best['micro_batch']}"
        + (", train.zero.offload.optimizer cpu" if best["offload_optimizer"] else "")
        + (f", train.activation_checkpointing {str(best['activation_checkpointing']).lower()}" if replays else "")
        if best
        else f"no stage and micro-batch fits on {job.workers.most} workers; use {more}more workers, offload, or a smaller model"
    )
    return f"train.zero.stage {chosen['stage']}, train.micro_batch {chosen['micro_batch']}: each worker {what}; {way}"
