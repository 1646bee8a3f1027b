"""Resolves `train.parallel: auto`: replaces `auto` by the fastest parallelism configuration that `heliostat plan JOB --rank`
finds.

Commands and the API resolve a job before they check, submit, or train this job. So commands, API, and run use the same
configuration, and the run's record contains the configuration's keys. A run that is resumed on the same number of workers keeps
its configuration.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path

from heliostat import schema
from heliostat.checkpoint import layout
from heliostat.cluster import cluster_file
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.config.spec import Job
from heliostat.errors import ConfigError, StorageError
from heliostat.plan import hardware, layouts
from heliostat.plan.hardware import Machine, Prices
from heliostat.plan.layouts import Layout
from heliostat.plan.planner import bound
from heliostat.plan.ranking import ranking
from heliostat.recipes.protocol import Recipe
from heliostat.storage.waiting import wait_for_store
from heliostat.validation import check

KEY = "train.parallel: auto"
log = logging.getLogger(__name__)


def settled(
    job: Job,
    cluster: Path | ClusterFile | None = None,
    resume: bool = False,
    device: str | None = None,
    prices: Prices | None = None,
    unread: str = "",
) -> Job:
    """Returns, for `train.parallel: auto`, the job with the fastest parallelism configuration that fits. Otherwise returns the
    job unchanged. Raises ConfigError if no configuration fits.

    `cluster`: the cluster file to plan for. Without `cluster` and `device`, the plan is for this machine. `resume`: whether to
    continue the run, if it exists. `unread`: the reason why an earlier attempt couldn't read the datasets.
    """
    if not job.train.parallel.auto:
        return job
    computed = check.computable(job, check.cpu_flags())  # the device's precision decides which configurations are possible
    before = recorded(computed) if resume else None
    if before is not None:
        kept = layouts.of(before)
        log.info(
            "%s: the run already has this number of workers, so the run keeps this parallelism configuration: %s",
            KEY,
            said(computed, kept),
        )
        return layouts.applied(computed, kept)
    plain, recipe, unread = bound(*check.check_job(computed), unread)
    pools = cluster_file.read(cluster) if isinstance(cluster, Path) else cluster
    ranked = ranking(plain, recipe, pools, device or (None if cluster else here(job)), prices)
    best, where = ranked.candidates[0], f"{ranked.planner.workers} workers of {ranked.planner.device.name}"
    if ranked.changes is None:
        raise ConfigError(
            f"{KEY}: no parallelism configuration fits on {where} (closest to fitting: {best.why}). Use more workers, or a "
            "smaller model"
        )
    note = f"; computed without the datasets: {unread}" if unread else ""
    which = (
        f"the fastest of {len(ranked.candidates)} parallelism configurations on {where}; the plan predicts "
        f"{best.speed['step_s']:.3g} s per step"
    )
    log.info("%s: %s: %s%s", KEY, which, shown(ranked.changes), note)
    return schema.validate(Job, schema.apply(computed.dump(), ranked.changes), job.name)


def prepared(path: Path, settings: list[str] | None = None, cluster: Path | ClusterFile | None = None) -> tuple[Job, Recipe, str]:
    """Loads a job file for planning, and resolves `train.parallel: auto`. Returns the same values as `planner.prepare`."""
    return bound(*check.check_job(settled(check.load_job(path, settings, cluster), cluster)))


def recorded(job: Job) -> Job | None:
    """Returns the job that the run's newest checkpoint contains, if both jobs have the same number of workers and of GPUs.
    Otherwise returns None."""
    try:
        wait_for_store(job.run_folder)
        newest = layout.latest(job.run_folder)
    except StorageError as e:
        log.warning("%s: can't read the run's parallelism configuration: %s", KEY, e)
        return None
    before = newest.job if newest else None
    same = before and before.workers.count in job.worker_counts() and before.workers.gpus == job.workers.gpus
    return before if same else None


def here(job: Job) -> str | None:
    """Finds this machine's GPU in the price table. Returns None if the job or the machine has no GPU. Raises ConfigError if this
    GPU isn't in the table."""
    if not job.workers.gpus:
        return None
    import torch

    if not torch.cuda.is_available():
        log.info("%s: this machine has no GPU, so the plan is for %s", KEY, hardware.DEFAULT_GPU)
        return None
    return named(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, hardware.table()["devices"])


def elsewhere() -> str:
    """Returns the device to plan for if no cluster file names a GPU: the default GPU."""
    log.info("%s: no cluster file names the GPUs, so the plan is for %s", KEY, hardware.DEFAULT_GPU)
    return hardware.DEFAULT_GPU


def named(name: str, memory: float, devices: Mapping[str, Machine]) -> str:
    """Finds a GPU in a price table by its CUDA name and its `memory` in bytes. Raises ConfigError if this GPU isn't in the
    table."""
    if device := hardware.find(name, memory, devices):
        return device
    raise ConfigError(
        f"{KEY}: this machine's {name} with {memory / hardware.GIB:.0f} GiB isn't in the price table. Run "
        "`heliostat plan JOB --rank --prices FILE --device NAME`, and set the configuration that this command finds"
    )


def said(job: Job, wanted: Layout) -> str:
    """Formats the `--set` options that change a job to a parallelism configuration."""
    return shown(layouts.changes(job, wanted))


def shown(settings: list[str]) -> str:
    return " ".join(f"--set {shlex.quote(s)}" for s in settings) or "the job without changes"
