"""Evaluates a run during training: scores the held-out samples, and draws a recipe's pictures, on all workers together.

Each worker reads its held-out samples once. A recipe's `gallery()` has `count` pictures. Picture number i depends only on the
weights and on i, so any worker can draw it.
"""

from __future__ import annotations

import logging
import operator
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from heliostat.checkpoint import agreement
from heliostat.config.spec import Job
from heliostat.data import content
from heliostat.data.chunks import Gathered
from heliostat.data.content import Content
from heliostat.data.dataset import Dataset
from heliostat.data.device_streams import LateRead, uploaded
from heliostat.engine.sample_group import SampleGroup
from heliostat.errors import DataError
from heliostat.recipes import building
from heliostat.recipes.batches import in_order, taken
from heliostat.recipes.comparing import ComparesImages, Comparing, WorkerPart
from heliostat.recipes.protocol import Draws, Evaluates, Gallery, Recipe
from heliostat.runs.events import Evaluation
from heliostat.training.worker.context import Context, Due, Hook
from heliostat.training.worker.training_state import TrainingState

if TYPE_CHECKING:
    from heliostat.engine.deepspeed_engine import DeepSpeedEngine

log = logging.getLogger(__name__)

AT_ONCE = 64  # pictures per call of `draw`


class Evaluations(Hook):
    """Scores the model as often as the job asks for. Uses the averaged weights if the job keeps an average."""

    def __init__(self, context: Context, state: TrainingState, recipe: Recipe, dataset: Dataset, sharing: SampleGroup) -> None:
        self.context, self.state, self.engine, self.recipe = context, state, state.engine, recipe
        self.held_out = HeldOut(context.job, dataset, recipe, sharing)
        self.gallery = recipe.gallery() if isinstance(recipe, Draws) else None
        self.comparing = Comparing(self.gallery, dataset) if isinstance(self.gallery, ComparesImages) else None

    def on_save(self, done: int, due: Due) -> None:
        """Evaluates the model if an evaluation is due, and stores the scores as the latest scores."""
        if not due.evaluates:
            return
        context, engine, device = self.context, self.engine, self.engine.device
        images: dict[str, bytes] = {}
        with context.ledger("evaluating"):
            engine.eval()
            with self.state.averaged():
                scores = self.held_out.scores(engine, device, context.control, context.progressed)
                context.latest.scored_at = done
                if self.gallery:
                    judged, images = show(self.gallery, engine, device, context.control, context.progressed, self.comparing)
                    scores |= judged
            engine.train()
            building.rest(self.recipe, engine.module)
            context.latest.scores = scores
            context.posts.tell(Evaluation(step=done, scores=scores, images=images))


class HeldOut:
    """Holds this worker's part of the held-out samples, which it reads once and keeps in memory."""

    def __init__(self, job: Job, dataset: Dataset, recipe: Recipe, sharing: SampleGroup) -> None:
        assert job.evaluate and isinstance(recipe, Evaluates)
        self.recipe, self.evaluates, self.sharing = recipe, recipe, sharing
        everything = dataset.order.held_out(job.evaluate.samples)
        self.micro = job.train.micro_batch_size
        sources = everything.source if job.data.one_source_batches else np.zeros(len(everything), int)
        deal = dealt_whole if recipe.gathered else dealt
        replica, replicas = sharing.replica, sharing.replicas
        parts = [deal(np.flatnonzero(sources == s), replica, replicas, self.micro) for s in np.unique(sources)]
        filled = self.keys = np.concatenate([numbers for numbers, _ in parts])
        self.batches = len(filled) // self.micro  # the same on every worker, because ZeRO-3's all-gathers are collective
        take = type(everything)(*(getattr(everything, f)[filled] for f in ("position", "source", "epoch", "chunk", "row")))
        gathered = dataset.gather(take)
        self.content = whole(gathered, self.micro, lambda: dataset.gather(everything))
        self.counted = np.concatenate([counted for _, counted in parts])
        self.counted &= sharing.counts  # only one of the workers that compute the same scores counts them
        if lost := int(self.counted[list(gathered.faults)].sum()):
            log.warning(
                "%d held-out samples are bad and don't count in the scores: %s", lost, next(iter(gathered.faults.values()))
            )
        self.counted[list(gathered.faults)] = False

    @torch.no_grad()
    def scores(
        self, model: DeepSpeedEngine, device: torch.device, group: dist.ProcessGroup, progressed: Callable[[], None]
    ) -> dict[str, float]:
        """Computes the recipe's scores on all held-out samples, on all workers together. Calls `progressed` after each batch.

        Rank 0 gets the tensors that the recipe gathers, and computes the metrics from them. Every worker gets all scores.
        """
        names: list[str] = []
        totals = torch.zeros(0, dtype=torch.float64)
        unread: deque[tuple[LateRead, torch.Tensor]] = deque()  # scores [names, batch], and a mask of the samples that count
        kept: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        for i in range(self.batches):
            rows = slice(i * self.micro, (i + 1) * self.micro)
            whole = self.evaluates.held_out_batch(content.part(self.content, rows), self.keys[rows])
            batch = uploaded(self.sharing.cut(self.recipe, whole), device)
            scores = self.evaluates.evaluate(model, batch)
            if self.evaluates.gathered:
                kept.append((self.keys[rows][self.counted[rows]], taken(scores, self.evaluates.gathered, self.counted[rows])))
            names = sorted(set(scores) - set(self.evaluates.gathered))
            if names:
                values = torch.stack([scores[n].double() for n in names])
                unread.append((LateRead(values), torch.from_numpy(self.counted[rows])))
            totals = _added(totals, unread, but=1)
            progressed()
        totals = _added(totals, unread)
        progressed()  # raises after an abort, when the numbers don't count
        if len(totals):
            dist.all_reduce(totals, group=group)
        metrics = self.evaluates.metrics(dict(zip(names, totals.tolist(), strict=True)))
        return metrics | self._measured(kept, group) if self.evaluates.gathered else metrics

    def _measured(self, kept: list[tuple[np.ndarray, dict[str, np.ndarray]]], group: dist.ProcessGroup) -> dict[str, float]:
        parts = agreement.merged(group, lambda: [kept], operator.add)
        return agreement.first(group, lambda: self.evaluates.measure(in_order(parts or [])))


def _added(totals: torch.Tensor, unread: deque[tuple[LateRead, torch.Tensor]], but: int = 0) -> torch.Tensor:
    """Adds unread batches to the totals, float64 [names].

    Leaves out the last `but` batches, because the device may still be computing them.
    """
    while len(unread) > but:
        scores, counted = unread.popleft()
        sums = torch.stack([(values * counted).sum() for values in scores.values()])
        totals = totals + sums if len(totals) else sums
    return totals


def whole(gathered: Gathered, micro: int, everything: Callable[[], Gathered]) -> Content:
    """Replaces each bad row, which is null, with a good row, so that recipes get only good rows. Replaced rows don't count in
    scores.

    The replacement is the first good row of the same micro-batch, so that it adds no padding to the other rows. A micro-batch
    without a good row repeats this worker's first good row, or else the first good held-out sample. Raises DataError if no sample
    is good.
    """
    if not gathered.faults or isinstance(gathered.content, np.ndarray):  # bad token samples are zeros
        return gathered.content
    index, good = np.arange(len(gathered.content)), _good(gathered)
    if not len(good):
        gathered, reason = everything(), next(iter(gathered.faults.values()))
        if not len(good := _good(gathered)):
            raise DataError(f"{reason}. All held-out samples are bad, so none can be scored. Prepare the dataset again")
        return content.take(gathered.content, np.full(len(index), good[0]))
    for i in gathered.faults:
        near = good[good // micro == i // micro]
        index[i] = near[0] if len(near) else good[0]
    return content.take(gathered.content, index)


def _good(gathered: Gathered) -> np.ndarray:
    return np.setdiff1d(np.arange(len(gathered.content)), list(gathered.faults))


def dealt(samples: np.ndarray, rank: int, world: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
    """Selects this worker's part of the samples, in full micro-batches. Every worker has the same number of micro-batches.

    Returns the samples, and a mask of the samples that count; the other samples are padding.
    """
    mine = samples[rank::world]
    size = -(-len(samples) // (world * micro)) * micro
    filled = np.resize(mine, size) if len(mine) else np.full(size, samples[0])
    return filled, np.arange(size) < len(mine)


def dealt_whole(samples: np.ndarray, rank: int, world: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
    """Selects this worker's micro-batches. A micro-batch has the same samples on any number of workers.

    So gathered tensors have the same bits on any number of workers. Every worker gets the same number of micro-batches. Returns
    the samples, and a mask of the samples that count.
    """
    batches = -(-len(samples) // micro)
    mine = rank + world * np.arange(-(-batches // world))
    places = (np.minimum(mine, batches - 1)[:, None] * micro + np.arange(micro)).ravel()
    return samples[np.minimum(places, len(samples) - 1)], (places < len(samples)) & np.repeat(mine < batches, micro)


@torch.no_grad()
def show(
    gallery: Gallery,
    model: DeepSpeedEngine,
    device: torch.device,
    group: dist.ProcessGroup,
    progressed: Callable[[], None],
    comparing: Comparing | None = None,
) -> tuple[dict[str, float], dict[str, bytes]]:
    """Draws the pictures of a recipe's gallery. Returns the scores, on every rank, and the PNG images by name, on rank 0.

    All ranks call this function together. Every rank draws the same number of pictures, because all ranks must take part in
    ZeRO-3's all-gathers. Calls `progressed` regularly. `comparing`: compares the pictures with real images.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    each = -(-gallery.count // world)
    mine = [min(rank + i * world, gallery.count - 1) for i in range(each)]
    drawn: list[np.ndarray] = []
    for first in range(0, each, AT_ONCE):
        drawn += gallery.draw(model, device, mine[first : first + AT_ONCE])
        progressed()
    own = dict(zip(mine, drawn, strict=True))
    pictures = agreement.merged(group, lambda: own, operator.or_) or {}
    worker, arrays, images = WorkerPart(rank, world, device, progressed), dict[str, np.ndarray](), dict[str, bytes]()
    if comparing:
        without_padding = {n: own[n] for n in own if n % world == rank}
        arrays = comparing.features(without_padding, worker, lambda work: agreement.merged(group, work, operator.add))

    def judge() -> dict[str, float]:
        shown = [pictures[n] for n in range(gallery.count)]
        scores, pngs = gallery.judge(shown, progressed)
        images.update(pngs)
        if comparing:
            compared, pngs = comparing.scores(shown, arrays, worker)
            images.update(pngs)
            scores |= compared
        return scores

    return agreement.first(group, judge), images
