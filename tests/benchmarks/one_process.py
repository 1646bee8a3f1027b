"""Trains a job in one plain process, without Ray: its recipe, its data order, and heliostat's engine of one worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heliostat.config.schedules import factor
from heliostat.data.dataset import open_dataset
from heliostat.data.order import SamplePlaces
from heliostat.engine import deepspeed_engine
from heliostat.validation import check

ALONE = ["workers.count=1", "mlflow.register=null"]
CHUNK = 16  # samples that are scored at a time


def checked(job: Path, keys: list[str]) -> Any:
    """Checks a job, for one worker."""
    return check.check(check.load_job(job, [*keys, *ALONE]))


def train(made: Any, share: Callable[[int, float], float]) -> tuple[Any, int, float]:
    """Trains until `share(steps, CPU seconds)`, which the schedule follows, is 1; returns the engine, and these two numbers."""
    job, recipe, data = made.job, made.recipe, open_dataset(made.plan)
    settings, spent, step = job.train, 0.0, 0
    engine = deepspeed_engine.build_engine(job, recipe)
    while (done := share(step, spent)) < 1:
        rows = data.read(data.order.locate(data.order.step(step).ravel()))
        began = time.process_time()
        at = min(settings.steps - 1, int(done * settings.steps))
        deepspeed_engine.set_lr(engine, settings.optimizer.lr * factor(settings.schedule, at, settings.steps))
        for part in np.split(rows, settings.global_batch_size // settings.micro_batch_size):
            batch = recipe.batch(part)
            engine.backward(recipe.loss(engine, batch).sum / recipe.terms(batch))
            engine.step()
        spent, step = spent + time.process_time() - began, step + 1
    return engine, step, spent


@torch.no_grad()
def scores(made: Any, engine: Any, samples: SamplePlaces) -> dict[str, float]:
    """Scores samples of a job with an engine of the same recipe."""
    rows = open_dataset(made.plan).read(samples)
    engine.eval()
    sums: dict[str, float] = {}
    for part in np.array_split(rows, -(-len(rows) // CHUNK)):
        for name, values in made.recipe.evaluate(engine, made.recipe.batch(part)).items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    engine.train()
    return made.recipe.metrics(sums)
