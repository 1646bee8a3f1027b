"""Tests the terms of text-to-image losses on forked ranks: every stage, number of workers, and micro-batch computes the same run,
and resumes the checkpoints of another configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from heliostat.config.spec import Job

from tests.integration.layouts import SMALL_STAYS_DIVIDED, STEPS, Grid, Rows, in_rings
from tests.unit import build_images
from tests.unit.build_job import job

pytestmark = pytest.mark.ci
MODELS: dict[str, dict[str, Any]] = {
    "loss": {
        "objective": {"prediction": "x", "timesteps": "logit_normal", "timestep_mean": 0.5, "shift": 1.5, "min_snr": 5.0},
        "contrastive": {}, "immiscible": {"candidates": 2}, "captions": [{"text": "{caption}"}, {"text": "a picture of {label}"}],
    },
    "noise": {"objective": {"prediction": "flow", "timesteps": "logit_normal"}, "immiscible": {"group": 4}},
}  # fmt: skip


class Case(NamedTuple):
    model: str
    stage: int
    workers: int
    micro: int

    def __str__(self) -> str:
        return f"{self.model}-zero{self.stage}-{self.workers}-{self.micro}"


RIGHT = {name: Case(name, 0, 1, 4) for name in MODELS}
OTHERS = [Case("loss", 3, 2, 2), Case("loss", 2, 4, 4), Case("noise", 3, 2, 4), Case("noise", 1, 4, 4)]
CASES = [*RIGHT.values(), *OTHERS]


def described(case: Case, folder: Path) -> Job:
    images = build_images.job(folder / "text_to_image", caption_dropout=0.3, **MODELS[case.model])
    return job(**{
        **images, "name": str(case), "storage": str(folder), "data.shuffle_window": 64, "data.virtual_ranks": 4,
        "train.steps": STEPS, "train.global_batch_size": 16, "train.micro_batch_size": case.micro, "train.grad_clip": 0.5,
        "train.optimizer": {"lr": 1e-3, "eps": 1e-4}, "train.zero.stage": case.stage, "train.deepspeed": SMALL_STAYS_DIVIDED,
        "workers.count": case.workers, "evaluate": {"every": 2, "samples": 8, "fraction": 0.1},
    })  # fmt: skip


GRID = Grid(
    CASES, described, in_rings([case for case in CASES if case.model == name] for name in MODELS), lambda case: RIGHT[case.model]
)


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return GRID.played(request, tmp_path_factory.mktemp("terms"))


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_a_run_is_the_same_in_every_configuration(case: Case, played: Rows) -> None:
    GRID.trains(case, played, near=2)


@pytest.mark.parametrize("loaded", CASES, ids=str)
def test_a_run_resumes_from_another_configuration(loaded: Case, played: Rows) -> None:
    GRID.goes_on(loaded, played, rel=4e-5)
