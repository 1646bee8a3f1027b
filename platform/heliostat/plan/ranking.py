"""Ranks those parallelism configurations of a job that fit in memory by their time per step: `heliostat plan JOB --rank`,
`train.parallel: auto`.

heliostat makes a separate plan for each number of workers that share matrices or experts. With another `train.parallel.tensor`, a
worker's matrices have other shapes, so the model is counted again. Only configurations that `heliostat check` accepts are listed.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from heliostat import schema
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.config.fields import divisors
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.plan import hardware, layouts, planner
from heliostat.plan.estimate import Planner
from heliostat.plan.hardware import Prices
from heliostat.plan.layouts import Candidate, Layout
from heliostat.recipes.conformance import require_abilities
from heliostat.recipes.protocol import CutsSamples, DividesExperts, DividesMatrices, Recipe

EXPERT, TENSOR = "expert", "tensor"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranking:
    """Holds the ranked configurations on the maximum number of workers. `changes`: the `--set` values of the first configuration;
    None if the first configuration doesn't fit."""

    planner: Planner
    candidates: list[Candidate]
    changes: list[str] | None
    notes: list[str]

    def dump(self) -> dict[str, object]:
        layouts = [one.dump() for one in self.candidates]
        return {**planner.facts(self.planner), "layouts": layouts, "set": self.changes, "notes": self.notes}


def ranking(
    job: Job, recipe: Recipe, cluster: ClusterFile | None = None, device: str | None = None, prices: Prices | None = None
) -> Ranking:
    """Ranks the configurations of a job, each with the reason for its rank. Raises ConfigError if there is no possible
    configuration.

    For an elastic job, a configuration must also fit on the minimum number of workers.
    """
    table, estimates, counts = prices or hardware.table(), list[Candidate](), job.worker_counts()
    families, notes = divided(job, recipe)
    for one in families:
        shared = degrees(one, recipe, counts)
        fewest, most = planner.planners(one, recipe, cluster, device, table, exchanged=shared, counts=counts)
        for whole in layouts.candidates(most.job, most.workers, shared, most.selects):
            for layout in (whole, *fewest.partly(whole)):
                few = fewest.candidate(layout)
                estimates.append(most.candidate(layout) if few.fits else few)
    ranked = layouts.ranked(estimates, lambda layout: possible(job, layout, counts))
    if not ranked:
        raise ConfigError(
            f"{job.name}: no parallelism configuration trains on {most.workers} workers; "
            f"{'; '.join(notes) or 'use another number of workers'}"
        )
    return Ranking(most, ranked, layouts.changes(job, ranked[0].layout) if ranked[0].fits else None, notes)


def possible(job: Job, layout: Layout, counts: list[int]) -> bool:
    """Checks whether the job can have a configuration on each number of workers in `counts`."""
    try:
        return set(counts) <= set(layouts.applied(job, layout).worker_counts())
    except ConfigError as e:
        log.debug("%s: %s", layout, e)
        return False


def divided(job: Job, recipe: Recipe) -> tuple[list[Job], list[str]]:
    """Lists the ways to shard the model over the workers, each as a job. If possible, the first job doesn't shard the model.

    Also returns notes with the reasons, if no number of workers can shard the matrices, or if no number can shard the experts.
    """
    stage, parallel, notes, jobs = job.train.zero.stage, job.train.parallel, list[str](), [job]
    if parallel.tensor > 1 or parallel.expert > 1:
        try:
            jobs = [_divides(job, {}, stage)]
        except ConfigError as e:
            jobs = []
            notes.append(f"tensor or expert parallelism: {_last(e, job)}")
    for key, at in ((TENSOR, min(2, max(1, stage))), (EXPERT, 3)):
        own, why = list[Job](), ""
        for parts in _parts(job.worker_counts()):
            try:
                one = _divides(job, {key: parts}, at)
                _require(one, recipe)
                own.append(one)
            except ConfigError as e:
                why = why or _last(e, job)
        if why and not own:
            notes.append(f"no number of workers supports {'tensor' if key == TENSOR else 'expert'} parallelism: {why}")
        jobs += own
    return jobs, notes


def _last(e: ConfigError, job: Job) -> str:
    return str(e).splitlines()[-1].strip().removeprefix(f"{job.name}: ")


def _parts(counts: list[int]) -> list[int]:
    """Lists the group sizes above 1 that divide both the minimum and the maximum number of workers."""
    return divisors(math.gcd(counts[0], counts[-1]))[1:]


def _divides(job: Job, parallel: dict[str, int], stage: int) -> Job:
    """Copies a job with other degrees of parallelism, and with micro-batches of one sample. Raises ConfigError if the new job
    isn't valid."""
    raw = job.dump()
    train, zero = raw["train"], raw["train"]["zero"]
    zero |= {"stage": stage} | ({"offload": {}} if parallel else {})
    train |= {"parallel": parallel, "micro_batch_size": 1, "activation_checkpointing": job.train.activation_offload}
    return schema.validate(Job, raw, job.name)


def _require(job: Job, recipe: Recipe) -> None:
    """Raises ConfigError if the recipe's model doesn't support the job's tensor or expert parallelism."""
    require_abilities(job, recipe)
    if job.train.parallel.tensor > 1 and isinstance(recipe, DividesMatrices):
        recipe.require_matrices_divided(job.train.parallel.tensor)
    if job.train.parallel.expert > 1 and isinstance(recipe, DividesExperts):
        recipe.require_divided(job.train.parallel.expert)


def degrees(job: Job, recipe: Recipe, counts: list[int] | None = None) -> dict[int, int]:
    """Maps each number of workers that could share a sample (`train.parallel.sequence`) to the elements that each worker would
    send in the sample's forward pass.

    An elastic job must support each of these numbers both on its minimum and on its maximum number of workers. `counts`: numbers
    of workers to use instead of this minimum and maximum.
    """
    sent = dict[int, int]()
    for parts in [1, *_parts(counts or job.worker_counts())]:
        raw = job.dump()
        raw["train"] |= {"parallel": {**raw["train"]["parallel"], "sequence": parts}, "micro_batch_size": 1}
        try:
            schema.validate(Job, raw, job.name)
            sent[parts] = _exchanged(recipe, parts)
        except ConfigError as e:
            log.debug("%d workers can't share a sample: %s", parts, e)
    return sent


def _exchanged(recipe: Recipe, parts: int) -> int:
    """Counts the elements that each of `parts` workers would send if they shared a sample. Raises ConfigError if these workers
    can't share a sample."""
    if parts == 1:
        return 0
    if not isinstance(recipe, CutsSamples):
        raise ConfigError(
            f"train.parallel.sequence: {type(recipe).__name__} doesn't support sequence parallelism. Set this key to 1"
        )
    recipe.require_cut(parts)
    return recipe.exchanged(parts)
