"""Tests the counts of trained tokens by source: each sample counts once, for its own source, on any number of workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from heliostat.data.mixing import Shape
from heliostat.data.order import Order
from heliostat.data.split import whole
from heliostat.recipes.auditing import Audits, MaskAudit
from heliostat.recipes.protocol import Batch
from heliostat.runs.events import Steps
from heliostat.tracking import metrics
from heliostat.training.driver.progress import trained
from heliostat.training.worker.micro_batches import Micro, StepBatches
from heliostat.training.worker.step_reports import TrainedTokens

STEPS = 7


class Masked(Audits):
    """Counts the value of each sample as its trained tokens."""

    def audit(self) -> MaskAudit:
        raise NotImplementedError

    def trained(self, batch: Batch) -> torch.Tensor:
        return batch["value"]


def mixed(weights: list[float]) -> Order:
    splits = [whole(np.array([13, 0, 40 + 9 * i]), np.ones(3), 0.1) for i in range(len(weights))]
    return Order(splits, [(0, weights)], 5, Shape(8, 4, 2, 32))


def taken(order: Order, workers: int, counts: bool = True) -> np.ndarray:
    """Counts the steps' samples on some workers: int64 [sources]. A sample's value is its position in the sequence."""
    total = np.zeros(len(order.splits), dtype=np.int64)
    for rank in range(workers):
        recipe: Any = Masked()
        one = TrainedTokens(recipe, order, counts)
        lanes = range(rank, order.shape.lanes, workers)
        for step in range(STEPS):
            values = torch.from_numpy(order.step(step)[list(lanes)].ravel())
            micros = [Micro(0, np.zeros(0), {"value": part}) for part in values.split(1)]
            one.add(step, StepBatches(SimpleNamespace(lanes=lanes), micros, torch.zeros(())))  # type: ignore[arg-type]
        total += one.take()
        assert not any(one.take()), "tokens would count in two reports"
    return total


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [5.0, 0.3, 2.0]])
def test_each_sample_counts_once_for_its_own_source_on_any_number_of_workers(weights: list[float]) -> None:
    order = mixed(weights)
    places = order.locate(np.concatenate([order.step(step).ravel() for step in range(STEPS)]))
    right = [int(places.position[places.source == s].sum()) for s in range(len(weights))]
    assert all(taken(order, workers).tolist() == right for workers in (1, 2, 4))
    assert not taken(order, 2, counts=False).any(), "workers that compute a sample together would count it several times"


def test_the_progress_line_and_mlflow_show_the_counts_of_each_source() -> None:
    event = Steps(first=0, loss=[1.0], grad_norm=[1.0], lr=[0.1], seconds=1.0)
    assert not trained(event)
    event.sources = {"chat": {"tokens": 9.0, "trained_tokens": 1234.0}}
    assert trained(event) == "trained tokens/step 1,234"
    event.sources["code"] = {"tokens": 9.0, "trained_tokens": 56.0}
    assert trained(event) == "trained tokens/step chat 1,234, code 56"
    logged = {point.key: point.value for point in metrics.points(event)}
    assert (logged["train/data/chat/trained_tokens"], logged["train/data/code/trained_tokens"]) == (1234.0, 56.0)
