"""Tests that a loss spike that the job doesn't undo is reported everywhere: terminal, log, MLflow, and report."""

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from heliostat.config.spikes import Spike
from heliostat.errors import LossSpikeError
from heliostat.runs.events import Event
from heliostat.storage.locations import Location
from heliostat.tracking import local_curves
from heliostat.tracking.logger import RunOwner
from heliostat.tracking.report import page
from heliostat.training.driver.progress import ProgressReporter
from heliostat.training.worker.context import Posts
from heliostat.training.worker.loss_watch import LossWatch
from mlflow import MlflowClient
from rich.console import Console

from tests.integration.test_mlflow_outage import ended, steps
from tests.unit.build_job import job
from tests.unit.test_dataset import make_dataset

LOSSES = [1.0 + 0.01 * (i % 3) for i in range(20)] + [9.0] + [1.0] * 9 + [7.0] + [1.0] * 9
SPIKES = {21: 9.0, 31: 7.0}  # finished steps


def judged(policy: Spike, losses: list[float]) -> tuple[list[Event], str]:
    """Returns the messages of rank 0 about these losses, and the reason why it ended the attempt."""
    posted: list[Event] = []
    posts = Posts(SimpleNamespace(post=posted.append), 0)
    context: Any = SimpleNamespace(job=job(spike=policy.model_dump()), posts=posts)
    unread: Any = None  # no loss is without a number
    reason = ""
    try:
        LossWatch(context, unread, saved=lambda: None).on_report(0, losses)
    except LossSpikeError as e:
        reason = str(e)
    assert posts.unsaved == posted  # so they are kept beside the checkpoint, too
    return posted, reason


def test_a_spike_that_is_not_undone_is_told_on_the_terminal_in_the_log_in_mlflow_and_in_the_report(tmp_path, tracking, caplog):
    events, reason = judged(Spike(window=10), LOSSES)
    assert not reason and {e.step: e.loss for e in events} == SPIKES
    with caplog.at_level(logging.INFO, "heliostat"), ProgressReporter(Console(file=io.StringIO()), "x", 0, 40, "tokens") as show:
        for event in events:
            show.event(event)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 2 and said[0].startswith("step 21: loss spike (1 so far): loss 9 (usual loss 1.01, limit ")
    assert "--step 21" in said[0] and "Training continues" in said[0] and "step 31: loss spike (2 so far)" in said[1]

    data = make_dataset(tmp_path / "data", 1)
    mine = job(storage=str(tmp_path / "runs"), **{"mlflow.uri": tracking, "mlflow.experiment": "spikes", "evaluate": None})
    owner = RunOwner(mine, [data])
    for event in (*events[:1], steps(1, 31)):
        owner.post(event)
    client = owner.client()
    # the second spike reached the run's folder, and the driver died before MLflow had it
    local_curves.write(Location(str(Path(mine.run_folder.path))), 40, [*events[1:], steps(31, 41)])
    owner.finish("KILLED", "died", ended(1, 30))
    run = client.get_run(owner.run_id)
    assert run.data.tags["heliostat.spikes"] == "21" and run.data.metrics["train/spike"] == 9.0
    later = RunOwner(mine, [data])
    later.finish("FINISHED", "", ended(1, 40))
    run = MlflowClient(tracking_uri=tracking).get_run(later.run_id)
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/spike")}
    assert later.run_id == owner.run_id and history == SPIKES and run.data.tags["heliostat.spikes"] == "21,31"
    text = page.page(page.gather(client, run))
    assert "Loss spikes: 2" in text and "<td>31</td><td>7</td>" in text


def test_a_spike_that_is_undone_is_posted_too_and_ends_the_attempt(caplog):
    events, reason = judged(Spike(window=10, action="rollback"), LOSSES)
    assert reason.startswith("step 21: loss 9") and [e.step for e in events] == [21]
    with ProgressReporter(Console(file=io.StringIO()), "x", 0, 40, "tokens") as show:
        show.event(events[0])
    assert not caplog.records  # the driver says what becomes of it
