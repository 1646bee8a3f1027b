"""Tests that weights are exchanged with their average for an evaluation only while no save or copy of them is in progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.checkpoint.saver import Saver
from heliostat.config import spec
from heliostat.recipes import building
from heliostat.runs.time_ledger import Ledger
from heliostat.storage.locations import Location
from heliostat.training.worker.context import Due, Latest
from heliostat.training.worker.evaluation import Evaluations
from heliostat.training.worker.memory_copies import MemoryCopies
from heliostat.training.worker.training_state import TrainingState


@pytest.mark.parametrize("kept", ["a save", "a save and a copy"])
def test_an_evaluation_after_a_skipped_step_waits_for_the_save_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """A skipped fp16 step doesn't call the optimizer, whose step would have waited."""
    log: list[str] = []

    @contextmanager
    def applied() -> Iterator[None]:
        log.append("exchanged")
        yield
        log.append("exchanged back")

    state: Any = TrainingState.__new__(TrainingState)
    state.average = SimpleNamespace(applied=applied)
    state.saver = Saver(Location(str(tmp_path)), spec.Checkpoint(every=1), SimpleNamespace())
    state.saver._host.hold_back = lambda: log.append("the GPU's copies are waited for")
    state.memory = MemoryCopies(SimpleNamespace(), 0, 0, 1, print) if "copy" in kept else None  # type: ignore[arg-type]
    copied = [one._copied for one in (state.saver, state.memory) if one]

    def copy() -> None:
        for one in copied:
            time.sleep(0.2)
            log.append("copied")
            one.set()

    for one in copied:
        one.clear()
    threading.Thread(target=copy, daemon=True).start()
    evaluations: Any = Evaluations.__new__(Evaluations)
    evaluations.state, evaluations.gallery, evaluations.recipe = state, None, None
    evaluations.engine = SimpleNamespace(eval=lambda: None, train=lambda: None, module=None, device=None)
    evaluations.held_out = SimpleNamespace(scores=lambda *given: log.append("scored") or {})
    monkeypatch.setattr(building, "rest", lambda recipe, module: None)
    evaluations.context = SimpleNamespace(
        ledger=Ledger("computing"), control=None, progressed=None, latest=Latest(), posts=SimpleNamespace(tell=lambda event: None)
    )
    evaluations.on_save(7, Due(last=False, reports=True, evaluates=True, saves=False, keeps=False, holds=False))
    assert log[-3:] == ["exchanged", "scored", "exchanged back"]
    assert sorted(log[:-3]) == [*["copied"] * len(copied), "the GPU's copies are waited for"] and log[0] == "copied"
