"""Tests that sharded experts train like unsharded ones: losses, gradient norms, scores, receipts, load, and biases equal those of
one worker.

Their checkpoints load in any other configuration, to the bit. The loop's own worker runs real steps on real data on ranks without
Ray, like `heliostat check --numerics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from heliostat.config.spec import Job
from heliostat.numerics import play
from heliostat.parallel import experts

from tests.integration import layouts, selection
from tests.unit.test_experts import FAMILIES, MODELS

MIXTURES = {"mixtral": {**MODELS["mixtral"], "router_z_loss_coef": 0.01}, "gpt_oss": FAMILIES["gpt_oss"],
            "deepseek_v3": {**FAMILIES["deepseek_v3"], "router_bias_update_rate": 0.01}}  # fmt: skip


@dataclass(frozen=True)
class Case:
    stage: int
    workers: int
    expert: int
    arch: str = "mixtral"
    checkpointed: bool = False  # and at DeepSpeed's own threshold, at which small parameters stay gathered

    def __str__(self) -> str:
        return f"{self.arch}-zero{self.stage}-{self.workers}-by-{self.expert}{'-checkpointed' * self.checkpointed}"


SAVED_BY = layouts.in_rings((
    [Case(1, 1, 1), Case(3, 2, 2), Case(3, 4, 4), Case(2, 2, 1), Case(3, 4, 2), Case(3, 2, 1)],
    [Case(1, 1, 1, "deepseek_v3"), Case(3, 4, 2, "deepseek_v3")],
    [Case(1, 1, 1, "gpt_oss"), Case(3, 2, 2, "gpt_oss")],
))  # fmt: skip
CASES = [*SAVED_BY, Case(3, 2, 2, checkpointed=True)]
FEW = Case(1, 1, 1), Case(3, 2, 2)


def _job(case: Case, folder: Path) -> Job:
    changes: dict[str, Any] = {"model": {**MIXTURES[case.arch], "arch": case.arch, "vocab_size": 96}}
    changes |= {"workers.count": case.workers, "train.parallel": {"expert": case.expert}, "train.zero.stage": case.stage}
    changes["train.activation_checkpointing"] = case.checkpointed
    if not case.checkpointed:
        changes["train.deepspeed"] = layouts.SMALL_STAYS_DIVIDED
    return layouts.described(case, folder, **changes)


def _held(player: play.Player) -> dict[str, torch.Tensor]:
    """Returns the whole training state, including the biases."""
    biases = {f"buffer.{name}": b.clone() for name, b in experts.biases(player.engine.module)}
    return play.state(player.engine) | biases


def _load(player: play.Player) -> dict[str, Any]:
    return {"load": player.stepper.experts.report()}


GRID = layouts.Grid(CASES, _job, SAVED_BY, lambda case: Case(1, 1, 1, case.arch), held=_held, tell=_load)


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> layouts.Rows:
    return GRID.played(request, tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("case", selection.kept(CASES, *FEW), ids=str)
def test_divided_experts_train_as_one_worker_does(case: Case, played: layouts.Rows) -> None:
    """Compares every step's loss, the gradient norm over all parameters, each once, scores of held-out samples, receipts, and the
    exact number of tokens of every expert."""
    mine, right = GRID.trains(case, played)
    assert min(mine["norms"]) > 0.5  # each step is clipped
    assert mine["load"]["imbalance"][0] == right["load"]["imbalance"][0] > 1


@pytest.mark.parametrize("loaded", selection.kept(SAVED_BY, FEW[0]), ids=str)
def test_a_run_goes_on_with_experts_divided_otherwise(loaded: Case, played: layouts.Rows) -> None:
    """Parameters, moments, and biases are equal bit by bit, saved at another degree, stage, or number of workers. The losses then
    equal the unbroken run's."""
    GRID.goes_on(loaded, played)
