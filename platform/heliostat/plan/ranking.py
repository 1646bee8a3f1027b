"""Ranks the layouts in which a job could train, by time within memory: `heliostat plan JOB --rank`, and `train.parallel: auto`.

Every way in which the workers could divide the model, or share a sample, is a family of layouts that is planned by itself: with
`train.parallel.tensor` a worker's matrices are others, so the model is counted anew. Only what `heliostat check` would take is
offered.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from heliostat import schema
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.config.spec import Job
from heliostat.config.worker_counts import divisors
from heliostat.errors import ConfigError
from heliostat.plan import hardware, layouts, planner
from heliostat.plan.layouts import Layout
from heliostat.recipes.conformance import require_abilities
from heliostat.recipes.protocol import CutsSamples, DividesExperts, DividesMatrices, Recipe

EXPERT, TENSOR = "expert", "tensor"
log = logging.getLogger(__name__)


def ranking(
    job: Job, recipe: Recipe, cluster: ClusterFile | None = None, device: str | None = None, prices: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Ranks the layouts in which a job could train, each with why it is not the best.

    A layout of an elastic job must fit on its fewest workers, too.
    """
    table, made, counts = prices or hardware.table(), list[dict[str, Any]](), job.worker_counts()
    families, notes = divided(job, recipe)
    for one in families:
        shared = degrees(one, recipe, counts)
        fewest, most = planner.planners(one, recipe, cluster, device, table, exchanged=shared, counts=counts)
        for given in layouts.candidates(most.job, most.workers, shared, most.selects):
            for layout in (given, *fewest.partly(given)):
                few = fewest.candidate(layout)
                made.append(most.candidate(layout) if few["fits"] else few)
    found = layouts.ranked(made, lambda layout: possible(job, layout, counts))
    if not found:
        raise ConfigError(f"{job.name}: no layout trains on {most.workers} workers; {'; '.join(notes) or 'use others'}")
    return {
        **planner.facts(most),
        "layouts": [{**one, "layout": one["layout"].settings()} for one in found],
        "set": layouts.changes(job, found[0]["layout"]) if found[0]["fits"] else None,
        "notes": notes,
    }


def possible(job: Job, layout: Layout, counts: list[int]) -> bool:
    """Tells whether the job may have a layout, on every number of workers that it may have now."""
    try:
        return set(counts) <= set(layouts.applied(job, layout).worker_counts())
    except ConfigError as e:
        log.debug("%s: %s", layout, e)
        return False


def divided(job: Job, recipe: Recipe) -> tuple[list[Job], list[str]]:
    """Finds the ways in which the workers could divide the model, each as the job that does, first the one that does not.

    Returns also, of matrices and of experts, why no number of workers could divide them.
    """
    stage, parallel, notes, found = job.train.zero.stage, job.train.parallel, list[str](), [job]
    if parallel.tensor > 1 or parallel.expert > 1:
        try:
            found = [_divides(job, {}, stage)]
        except ConfigError as e:
            found = []
            notes.append(f"workers divide matrices or experts: {_last(e, job)}")
    for key, at in ((TENSOR, min(2, max(1, stage))), (EXPERT, 3)):
        made, why = list[Job](), ""
        for parts in _parts(job.worker_counts()):
            try:
                one = _divides(job, {key: parts}, at)
                _require(one, recipe)
                made.append(one)
            except ConfigError as e:
                why = why or _last(e, job)
        if why and not made:
            notes.append(f"no workers divide {'matrices' if key == TENSOR else 'experts'}: {why}")
        found += made
    return found, notes


def _last(e: ConfigError, job: Job) -> str:
    return str(e).splitlines()[-1].strip().removeprefix(f"{job.name}: ")


def _parts(counts: list[int]) -> list[int]:
    """Lists the sizes above 1 that groups of workers could have, with the fewest workers and with the most."""
    return divisors(math.gcd(counts[0], counts[-1]))[1:]


def _divides(job: Job, parallel: dict[str, int], stage: int) -> Job:
    """Copies a job with other workers that divide the model, and with what a layout may have beside; ConfigError if it would be
    no job."""
    raw = job.dump()
    train, zero = raw["train"], raw["train"]["zero"]
    zero |= {"stage": stage} | ({"offload": {}} if parallel else {})
    train |= {"parallel": parallel, "micro_batch": 1, "activation_checkpointing": job.train.activation_offload}
    return schema.validate(Job, raw, job.name)


def _require(job: Job, recipe: Recipe) -> None:
    """Raises ConfigError if the recipe's model cannot be divided as the job says."""
    require_abilities(job, recipe)
    if job.train.parallel.tensor > 1 and isinstance(recipe, DividesMatrices):
        recipe.require_matrices_divided(job.train.parallel.tensor)
    if job.train.parallel.expert > 1 and isinstance(recipe, DividesExperts):
        recipe.require_divided(job.train.parallel.expert)


def degrees(job: Job, recipe: Recipe, counts: list[int] | None = None) -> dict[int, int]:
    """Finds how many workers could share a sample (`train.parallel.sequence`), with the elements that each would then send.

    An elastic job's degrees are those that its fewest workers and its most can have, too. `counts`: other numbers of workers.
    """
    found = dict[int, int]()
    for parts in [1, *_parts(counts or job.worker_counts())]:
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
