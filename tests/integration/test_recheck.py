"""`train.recheck`: a flipped bit in one worker's weights is found and the worker named; nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.data import manifest
from heliostat.data.dataset import plan
from heliostat.errors import CorruptionError
from heliostat.train.worker.recheck import Recheck

from tests.golden import curves, data
from tests.integration import ranks
from tests.unit.build_job import job

STAGES = ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"))
FLIPPED = "model.layers.1.mlp.up_proj.weight"
STEPS = 4


def _steps(folder: str, stage: int, precision: str, **model: Any) -> curves.Steps:
    changes: dict[str, Any] = {"train.zero.stage": stage, "train.precision": precision, "workers.count": dist.get_world_size()}
    changes |= {"data.sources": [{"path": folder}], "evaluate": None, "train.recheck": {"every": 2}, "train.global_batch": 12}
    made = job(**changes, **model)
    return curves.Steps(made, plan(made, [manifest.read(location) for location in made.sources]))


def _recheck(steps: curves.Steps, group: Any) -> Recheck:
    where = f"node-{steps.rank}", f"10.0.0.{steps.rank}"
    return Recheck(steps.job, steps.engine, steps.recipe, steps.dataset, steps.batch_plan, group, where)


def _flip(p: torch.Tensor) -> None:
    """Flips the lowest bit of one weight."""
    kind = {2: torch.int16, 4: torch.int32}[p.element_size()]
    p.data.view(-1).view(kind)[7] ^= 1


def _play(steps: curves.Steps, recheck: Recheck | None, flip: int | None = None) -> list[Any]:
    """Trains some steps as the loop does; in worker 1, a bit flips before step `flip`."""
    samples, told = steps.dealt(), list[Any]()
    for step in range(STEPS):
        if step == flip and steps.rank == 1:
            _flip(dict(steps.engine.module.named_parameters())[FLIPPED])
        if recheck and recheck.due(step):
            recheck.look(step)
            told.append(step)
        steps._step(step, samples.next_step())
    losses = torch.stack(steps._losses).double()
    dist.all_reduce(losses)
    return [losses.tolist(), steps._norms, told]


def grid(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In every rank: each stage without looks, with them, and with a bit that flips, where workers have whole weights."""
    for stage, precision in STAGES:
        without = _play(_steps(folder, stage, precision), None)
        looked = _steps(folder, stage, precision)
        told = _play(looked, _recheck(looked, group))
        row = {"stage": stage, "without": without[:2], "with": told[:2], "at": told[2], "error": None}
        if stage < 3:
            flipped = _steps(folder, stage, precision)
            try:
                _play(flipped, _recheck(flipped, group), flip=1)
            except CorruptionError as e:
                row |= {"error": str(e), "nodes": e.nodes, "agreed": e.agreed}
        yield row


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict[str, Any]]:
    folder = data.tokens(tmp_path_factory.mktemp("data") / "documents")
    return ranks.run(f"{__name__}:grid", (2, 3), str(folder))


def test_looks_change_no_loss_and_no_gradient(told) -> None:
    """To the last bit, at every stage; looks are at the first step and at every second."""
    assert len(told) == len(STAGES) * 5
    for row in told:
        assert row["with"] == row["without"], row
        assert row["at"] == [0, 1, 3]


def test_a_flipped_bit_is_found_by_all_and_its_worker_named(told) -> None:
    """The lowest bit of one weight, at the next look, by every worker; of three workers the one is named, of two both."""
    rows = [row for row in told if row["stage"] < 3]
    for row in rows:
        assert "step 2: silent data corruption: worker" in row["error"]
        assert f"the weights of {FLIPPED}" in row["error"]
        assert row["nodes"] == (["node-1"] if row["workers"] == 3 else ["node-0", "node-1"])
        assert ("cannot be told" in row["error"]) == (row["workers"] == 2)
        assert row["agreed"] == 0
