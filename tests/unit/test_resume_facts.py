"""Tests that the state that a resumed run needs from the engine is in `checkpoint.json` and in in-memory checkpoints, declared in
one place."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.checkpoint import index
from heliostat.errors import CheckpointError
from heliostat.storage.records import Format
from heliostat.training.worker import training_state
from heliostat.training.worker.training_state import RESUME, ResumeFacts

from tests.unit import build_index

SCALE = {"cur_scale": 2048.0, "cur_iter": 12, "last_overflow_iter": 10, "cur_hysteresis": 1}


@dataclass
class Sharded:
    """Provides the part of an engine's state from which facts are read, and to which they are applied."""

    steps: int = 0
    scale: dict[str, Any] | None = None

    def read_loss_scale(self) -> dict[str, Any] | None:
        return self.scale

    def after_load(self, steps: int) -> None:
        self.steps = steps

    def write_loss_scale(self, values: dict[str, Any] | None) -> None:
        self.scale = values


def through_json(facts: object) -> dict[str, Any]:
    """Returns these facts as they are read back from a checkpoint."""
    saved = json.loads(index.encode(build_index.index(9, **asdict(facts))))  # type: ignore[call-overload]
    found = index.build(saved, 9)
    assert isinstance(found, index.CheckpointIndex)
    return found.resume


@pytest.mark.parametrize("scale", [SCALE, None])
def test_an_engine_continues_with_what_the_checkpoint_holds_of_it(scale):
    mine, other = Sharded(7, scale), Sharded()
    facts = ResumeFacts.of(SimpleNamespace(sharded_state=mine))
    read = RESUME.build(through_json(facts), "checkpoint.json")
    read.apply(SimpleNamespace(sharded_state=other))
    assert repr(other) == repr(mine), "counts stay whole numbers"
    assert ResumeFacts(**asdict(facts)) == facts, "as a copy in memory holds them"


def test_the_keys_of_checkpoints_stay():
    """Older versions read them at the top of `checkpoint.json`."""
    assert {f.name for f in fields(ResumeFacts)} >= {"optimizer_steps", "loss_scale"}
    saved = build_index.index(9, loss_scale=SCALE)
    assert {"optimizer_steps", "loss_scale"} <= saved.keys() and through_json(ResumeFacts(9, SCALE))["optimizer_steps"] == 9


def test_a_new_fact_needs_no_other_declaration():
    """The index was a closed record: a fact that only a resumed worker reads had to be declared there, and for in-memory
    checkpoints, too."""

    @dataclass(frozen=True)
    class Newer(ResumeFacts):
        tokens: int = 0

    read = Format(Newer, "index")
    assert read.build(through_json(Newer(9, None, 512)), "checkpoint.json") == Newer(9, None, 512)
    assert read.build(through_json(ResumeFacts(9)), "checkpoint.json") == Newer(9), "an older checkpoint"


@pytest.mark.parametrize("held", [{"optimizer_steps": -1}, {"optimizer_steps": "many"}, {"loss_scale": [1]}])
def test_facts_that_are_none_are_one_error(held):
    fault = rf"checkpoint\.json: isn't a valid index that this version of heliostat resumes from \({next(iter(held))}: "
    with pytest.raises(CheckpointError, match=fault):
        RESUME.build(index.build(build_index.index(9, **held), 9).resume, training_state.INDEX)  # type: ignore[attr-defined]
