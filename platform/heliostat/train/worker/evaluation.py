"""The held-out samples during training: read once, scored on all workers together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from heliostat.config.spec import Job
from heliostat.data import content
from heliostat.data.dataset import Dataset
from heliostat.recipes.protocol import Recipe


class HeldOut:
    """This worker's part of the held-out samples, read once and kept."""

    def __init__(self, job: Job, dataset: Dataset, rank: int, world: int) -> None:
        assert job.evaluate
        everything = dataset.order.held_out(job.evaluate.samples)
        self.micro = job.train.micro_batch
        sources = everything.source if job.data.one_source_batches else np.zeros(len(everything), int)
        parts = [dealt(np.flatnonzero(sources == s), rank, world, self.micro) for s in np.unique(sources)]
        filled = self.keys = np.concatenate([numbers for numbers, _ in parts])
        self.batches = len(filled) // self.micro  # the same on every worker: ZeRO-3 gathers together
        take = type(everything)(*(getattr(everything, f)[filled] for f in ("position", "source", "epoch", "chunk", "row")))
        found = dataset.gather(take)
        self.content = found.content
        self.counted = np.concatenate([counted for _, counted in parts])
        self.counted[list(found.faults)] = False  # a bad sample scores nothing

    @torch.no_grad()
    def sums(self, recipe: Recipe, model: Any, device: Any, group: Any, progressed: Callable[[], None]) -> dict[str, float]:
        """Every score of `recipe.evaluate`, summed over all held-out samples on all workers; calls back after each batch."""
        names: list[str] = []
        totals = torch.zeros(0, dtype=torch.float64)
        for i in range(self.batches):
            rows = slice(i * self.micro, (i + 1) * self.micro)
            batch = {k: v.to(device) for k, v in recipe.batch(content.part(self.content, rows), self.keys[rows]).items()}
            scores = recipe.evaluate(model, batch)
            names = sorted(scores)
            counted = torch.from_numpy(self.counted[rows])
            sums = torch.stack([(scores[n].double().cpu() * counted).sum() for n in names])
            totals = sums if not len(totals) else totals + sums
            progressed()
        dist.all_reduce(totals, group=group)
        return dict(zip(names, totals.tolist(), strict=True))


def dealt(samples: np.ndarray, rank: int, world: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
    """This worker's part of the samples in whole micro-batches, as many as every other worker's, and which of them count."""
    mine = samples[rank::world]
    size = -(-len(samples) // (world * micro)) * micro
    filled = np.resize(mine, size) if len(mine) else np.full(size, samples[0])
    return filled, np.arange(size) < len(mine)
