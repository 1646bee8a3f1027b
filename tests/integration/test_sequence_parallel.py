"""Tests that shared samples train like whole ones: losses, gradient norms, scores, receipts, and checkpoints equal those of one
worker.

This holds for any ZeRO stage, number of workers, and number that share a sample. The loop's own worker runs real steps on real
data on ranks without Ray, like `heliostat check --numerics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from heliostat.config.spec import Job

from tests.integration import layouts, selection
from tests.unit.build_job import BASE

TILE = 7  # tokens of an MLP's tile: a worker's stretch has several
SHAPES = ((1, 1), (2, 2), (4, 2), (4, 4))  # workers, and how many share a sample; the model has 2 heads of keys


@dataclass(frozen=True)
class Case:
    stage: int
    workers: int
    sequence: int
    extra: str = ""  # "documents" are kept apart; see EXTRAS

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.workers}-by-{self.sequence}{self.extra and '-' + self.extra}"


PLAIN = [Case(stage, *layout) for stage in range(4) for layout in SHAPES]
EXTRAS: dict[str, dict[str, Any]] = {
    "checkpointed": {"train.activation_checkpointing": True},
    "offloaded": {"train.activation_checkpointing": True, "train.activation_offload": True},
    "tiled": {"train.tiled_loss": True},
    "tiled-mlp": {"train.tiled_mlp": True},
    "all": {
        "train.tiled_loss": True,
        "train.tiled_mlp": True,
        "train.activation_checkpointing": 1,
        "train.activation_offload": True,
    },
}
EXTRA = [Case(2, 1, 1, "documents"), Case(2, 4, 2, "documents"), Case(3, 2, 2, "checkpointed"), Case(3, 2, 2, "offloaded"),
         Case(3, 2, 2, "tiled"), Case(1, 2, 2, "tiled-mlp"), Case(2, 2, 1, "tiled-mlp"), Case(3, 2, 1, "tiled-mlp"),
         Case(3, 2, 2, "all")]  # fmt: skip
CASES = PLAIN + EXTRA
ALONE, APART = Case(1, 1, 1), Case(2, 1, 1, "documents")  # whose losses are right
FEW = ALONE, Case(2, 2, 2), Case(3, 2, 2, "all")


def _job(case: Case, folder: Path) -> Job:
    changes: dict[str, Any] = {"workers.count": case.workers, "train.parallel": {"sequence": case.sequence}}
    changes |= {"train.zero.stage": case.stage, "data.document_mask": case.extra == "documents"}
    changes |= {"model": {**BASE["model"], "vocab_size": 96}, **EXTRAS.get(case.extra, {})}
    changes["train.deepspeed"] = layouts.SMALL_STAYS_DIVIDED
    return layouts.described(case, folder, batch=4, **changes)


def _tiled(recipe: Any) -> None:
    recipe.tile = TILE


def _other(case: Case) -> Case:
    """Returns the case to resume from: another configuration, at another stage. Each configuration is loaded by one other."""
    at = SHAPES.index((case.workers, case.sequence))
    return Case(3 - case.stage, *SHAPES[(at + 1) % len(SHAPES)])


def _right(case: Case) -> Case:
    return APART if case.extra == "documents" else ALONE


GRID = layouts.Grid(CASES, _job, {case: _other(case) for case in PLAIN}, _right, prepare=_tiled)


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> layouts.Rows:
    return GRID.played(request, tmp_path_factory.mktemp("sequence"))


@pytest.mark.parametrize("case", selection.kept(CASES, *FEW), ids=str)
def test_a_layout_trains_as_one_worker_does(case: Case, played: layouts.Rows) -> None:
    """Compares every step's loss and gradient norm, and the scores of held-out samples. The receipts are the same to the last
    bit."""
    GRID.trains(case, played)


@pytest.mark.ci
def test_offloaded_activations_give_the_same_losses_to_the_bit(played: list[dict[str, Any]]) -> None:
    found = [row for row in played if row.get("case") in ("zero3-2-by-2-checkpointed", "zero3-2-by-2-offloaded")]
    assert len(found) == 2
    assert found[0]["losses"] == found[1]["losses"] and found[0]["norms"] == found[1]["norms"]


@pytest.mark.parametrize("loaded", selection.kept(PLAIN, ALONE), ids=str)
def test_a_run_goes_on_in_another_layout(loaded: Case, played: layouts.Rows) -> None:
    """Parameters and moments are equal bit by bit, saved in another configuration and at another stage. The losses then equal the
    unbroken run's."""
    GRID.goes_on(loaded, played)
