"""Tests that one training step runs through the files that docs/concepts.md lists, at most nine: whoever reads these has read the
step."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import heliostat
import pytest
from heliostat.training.worker.collector import Collector
from heliostat.training.worker.context import Hook
from heliostat.training.worker.heartbeat import Heartbeat
from heliostat.training.worker.loss_watch import LossWatch
from heliostat.training.worker.micro_batches import BatchesAhead
from heliostat.training.worker.step import Loop
from heliostat.training.worker.step_reports import StepReports, TrainedTokens

from tests.golden import data
from tests.integration import layouts, ranks

PACKAGE = Path(heliostat.__file__).parent
CONCEPTS = Path(__file__).parents[2] / "docs" / "concepts.md"
FIRST, LAST = 2, 4  # steps that are recorded
MOST = 9
# what a step calls, and is read elsewhere: docs/concepts.md names these parts
OTHER_PARTS = {
    "recipe": r"recipes/|parallel/(?!division)",
    "order of samples": r"data/(?!device_streams)|storage/|schema",
    "parallelism": r"engine/(sample_group|tensor_group)\.py|parallel/division",
    "job's keys": r"config/",
    "ledger and events": r"runs/",
    "messages between workers": r"checkpoint/agreement\.py",
    "hooks": r"training/worker/(loss_watch|collector|training_state|profiler)\.py|checkpoint/saver\.py",
    "DeepSpeed": r"engine/(patches|stream_patches|sharded_state)\.py",
    "abort of an attempt": r"engine/process_group\.py|training/mailbox\.py",
    "this test": r"numerics/play\.py",  # reads the samples, as a worker does from its stream
}


class Recorded(Exception):
    """Ends the loop."""


class Recorder(Hook):
    """Records the modules of heliostat whose functions run in the recorded steps, in any thread."""

    def __init__(self) -> None:
        self.modules, self._on = set[str](), False
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def before_step(self, step: int) -> None:
        self._on = step >= FIRST
        if step == LAST:
            sys.setprofile(None)
            threading.setprofile(None)
            raise Recorded

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        path = frame.f_code.co_filename
        if self._on and event == "call" and path.startswith(str(PACKAGE)):
            self.modules.add(str(Path(path).relative_to(PACKAGE)))


def played(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Trains some steps with the real loop and its hooks. Of a worker, only Ray is left out."""
    made = layouts.described("step-files", Path(folder), **{"evaluate": None, "train.steps": 20, "train.log_every": 2})
    recorder = Recorder()
    one = layouts.player(made)
    heartbeat: Any = object.__new__(Heartbeat)
    heartbeat._ordered, heartbeat.step, heartbeat.micro = 0, 0, 0
    context = one.state.context
    hooks = [recorder, LossWatch(context, one.dataset, one.state.settle), one.state, Collector()]
    reports = StepReports(context, one.engine, one.recipe, one.unsealed, hooks, one.stepper.report,
                          TrainedTokens(one.recipe, one.dataset.order, one.sharing.counts))  # fmt: skip
    ahead = BatchesAhead(lambda: one.sharing.share(one._read), one.stepper.prepare)
    loop = Loop(context, one.stepper, one.unsealed, reports, heartbeat, hooks, (), ahead)
    try:
        loop.run()
    except Recorded:
        yield {"modules": sorted(recorder.modules)}
    finally:
        ahead.end()


@pytest.mark.ci
def test_a_step_runs_through_the_files_that_the_docs_list(tmp_path: Path) -> None:
    data.build(tmp_path)
    (row,) = ranks.run(f"{__name__}:played", (1,), str(tmp_path))
    section = CONCEPTS.read_text().partition("<!-- begin: step -->")[2].partition("<!-- end: step -->")[0]
    listed = set(re.findall(r"^\| `([\w/]+\.py)`", section, re.MULTILINE))
    assert {name for name in row["modules"] if not any(re.match(part, name) for part in OTHER_PARTS.values())} == listed
    assert len(listed) <= MOST
    assert len((PACKAGE / "training/worker/step.py").read_text().splitlines()) < 300, "it shows a whole step"
