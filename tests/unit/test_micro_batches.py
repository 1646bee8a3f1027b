"""Tests that a step may take longer than `watchdog.stall`: each micro-batch is progress, without a wait for the device."""

from typing import Any

import numpy as np
import pytest
import torch
from heliostat.data.device_streams import on_device
from heliostat.recipes.protocol import Loss
from heliostat.training.worker import coupled
from heliostat.training.worker.micro_batches import Micro
from heliostat.training.worker.objective import Objective


class Unread(torch.Tensor):
    """Simulates a tensor of a device that must not be waited for, so its value must not be read."""

    def __float__(self) -> float:
        raise AssertionError("the host waits for the device")

    item = tolist = cpu = __bool__ = __float__  # type: ignore[assignment]


class Uncompleted:
    def complete(self, batch: Any) -> Any:
        return batch


class Recipe(Uncompleted):
    def loss(self, model: Any, batch: Any) -> Loss:
        return Loss(batch["x"].as_subclass(Unread).sum())


def micros(count: int) -> list[Micro]:
    return [Micro(i, np.array([i]), {"x": torch.ones(2)}) for i in range(count)]


@pytest.fixture
def engine(monkeypatch) -> Any:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)

    class Engine:
        device = torch.device("cpu")

    return Engine()


def test_every_micro_batch_is_progress(engine):
    counted: list[int] = []
    objective = Objective(Recipe(), progressed=lambda: counted.append(1))  # type: ignore[arg-type]
    for i, _ in enumerate(objective.shares(engine, micros(5), 10)):
        assert len(counted) == i, "once its backward pass is under way"
    assert len(counted) == 5


def test_every_pass_of_a_loss_that_couples_samples_is_progress(engine, monkeypatch):
    monkeypatch.setattr(coupled, "_from_all", lambda tensor: tensor)
    counted: list[int] = []
    weight = torch.ones(1, requires_grad=True)

    class Couples(Uncompleted):
        def represent(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            return {"z": batch["x"][:1] * weight}

        def couple(self, found: dict[str, torch.Tensor]) -> Loss:
            return Loss((found["z"] ** 2).sum())

    step = coupled.first_pass(  # type: ignore[call-arg]
        Couples(),
        engine,
        micros(4),
        lambda made, name: made,
        4,
        lambda: counted.append(1),  # type: ignore[arg-type]
    )
    assert len(counted) == 4 and step.loss.sum == 4


def test_batches_come_in_order_and_uncopied_on_a_cpu():
    """`tests.gpu` compares the path to a GPU with this one."""
    micros = [{"tokens": torch.full((2, 3), i), "labels": torch.full((2,), -i)} for i in range(3)]
    got = list(on_device(micros, torch.device("cpu")))
    assert [[batch[name].tolist() for name in batch] for batch in got] == [[m[name].tolist() for name in m] for m in micros]
    assert all(batch["tokens"] is micro["tokens"] for batch, micro in zip(got, micros, strict=True))


def test_a_batch_is_completed_once_without_gradients_before_its_loss(engine):
    weight = torch.ones(2, requires_grad=True)
    seen: list[str] = []

    class Completes(Recipe):
        def complete(self, batch: Any) -> Any:
            seen.append("complete")
            return batch | {"y": batch["x"] * weight}

        def loss(self, model: Any, batch: Any) -> Loss:
            assert not batch["y"].requires_grad
            seen.append("loss")
            return super().loss(model, batch)

    list(Objective(Completes()).shares(engine, micros(2), 4))  # type: ignore[arg-type]
    assert seen == ["complete", "loss"] * 2
