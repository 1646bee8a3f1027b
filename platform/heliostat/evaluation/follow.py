"""Scores a run's checkpoints as they appear, in a separate process: `heliostat model benchmark RUN SUITE --follow`.

Training doesn't wait for this process. Each checkpoint is first exported to a local folder, and from then on retention may delete
the checkpoint. Checkpoints that retention deletes earlier are counted as removed. A checkpoint may be written and deleted while
another checkpoint is scored. Such a checkpoint is known from the run's receipts.

Each result is a file in the run's folder. The file is written before the result is sent to MLflow. If you run the command again,
it continues after the last result, and sends the results that MLflow lacks.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from heliostat.checkpoint import layout
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.errors import CheckpointError, ConfigError, DataError, HeliostatError, TrackingError
from heliostat.evaluation import recording
from heliostat.evaluation.run import Benchmark
from heliostat.evaluation.suite import Result, same
from heliostat.inference.export import export
from heliostat.runs import liveness, mlflow_id
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, open_
from heliostat.text import brief

log = logging.getLogger(__name__)

POLL_S = 2.0
RETRY_S = 30.0
REMOVED = "retention removed its checkpoint before it was scored"


@open_
class KeptResult(TypedDict):
    """Describes the parts of a stored result that are read again. `written`: the time when the scored checkpoint was written."""

    suite: dict[str, object]
    written: float
    tasks: list[dict[str, Any]]
    average: dict[str, Any]
    recorded: dict[str, Any]


KEPT = Format(KeptResult, "result of a benchmark", DataError, fix="Delete this file. heliostat then scores the checkpoint again")


@dataclass
class Followed:
    """Follows a run and scores its checkpoints.

    `show`: called with each result. `every`: scores only steps that are multiples of this number, and the last step. `removed`,
    `incomplete`, `failed`: the steps without a result, for each of these three reasons.
    """

    run: Location
    benchmark: Benchmark
    show: Callable[[int, Result], None]
    every: int = 1
    results: dict[int, Result] = field(default_factory=dict)
    removed: dict[int, str] = field(default_factory=dict)
    incomplete: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    _again: float = 0.0  # time of the next attempt to send, if MLflow didn't answer

    def follow(self, poll_s: float = POLL_S) -> None:
        """Scores checkpoints until the run's driver has ended and all checkpoints are scored. Looks for new checkpoints every
        `poll_s` seconds."""
        self._read()
        while True:
            lives = alive(self.run)  # checked before listing checkpoints: if the driver has ended, the list is complete
            pending = [step for step in self._wanted(lives) if self._open(step)]
            for step in pending:  # oldest first, because retention removes it first
                self._score(step)
            self._try_to_send(time.monotonic())
            if not lives and not pending:
                break
            if not pending:
                time.sleep(poll_s)
        self._try_to_send(self._again)
        self._tag_later_versions()
        left = layout.steps(self.run)
        for step in {*self._wanted(False), *self._saved()} - self.results.keys() - self.failed.keys() - self.removed.keys():
            if step in left or step > max(left, default=0):
                self.incomplete[step] = "its checkpoint is incomplete, and its writer is gone"
            else:
                self.removed[step] = REMOVED

    def _wanted(self, lives: bool) -> list[int]:
        """Lists the steps with a checkpoint to score. The last step is included only after the driver has ended."""
        steps = layout.steps(self.run)
        return [step for step in steps if step % self.every == 0 or (not lives and step == steps[-1])]

    def _saved(self) -> list[int]:
        """Lists the steps to score for which the run began to save a checkpoint. The run's receipts, which are never deleted,
        contain these steps."""
        every = (run_folder.step_of(name) for name, _ in self.run.join(run_folder.RECEIPTS).files())
        return [step for step in every if step % self.every == 0]

    def _read(self) -> None:
        """Reads the results of an earlier command. Raises ConfigError if they are from a different suite with the same name."""
        suite = self.benchmark.suite
        for name, _ in self.run.join(run_folder.BENCHMARKS, suite.name).files():
            step = run_folder.step_of(name)
            place = run_folder.benchmark(self.run, suite.name, step)
            kept = dict(KEPT.read(place))
            if not same(kept["suite"], suite):
                raise ConfigError(
                    f"name: {suite.name!r} has scored step {step} of {self.run} with other settings. Rename the suite"
                )
            self.results[step] = kept

    def _open(self, step: int) -> SavedCheckpoint | None:
        """Opens a checkpoint that is complete and not scored yet. Returns None for any other checkpoint. A rewritten checkpoint
        counts as not scored."""
        if step in self.failed:
            return None
        try:
            checkpoint = layout.open_checkpoint(self.run, step)
        except CheckpointError:
            return None  # the checkpoint is being written, or was just removed
        known = self.results.get(step)
        return None if known and known["written"] == checkpoint.index.written else checkpoint

    def _score(self, step: int) -> None:
        checkpoint = self._open(step)
        if checkpoint is None:
            self._lost(step)
            return
        with tempfile.TemporaryDirectory(prefix="heliostat-benchmark-") as folder:
            model = Path(folder) / "model"
            try:
                export(checkpoint, model, mlflow_id.record(self.run).get("run_id"))
            except (HeliostatError, FileNotFoundError) as e:
                if not self._lost(step):
                    self._fail(step, e)
                return
            try:
                result = self.benchmark.score(model)
            except ConfigError:
                raise  # a fault of the suite, or of all models of the run
            except HeliostatError as e:
                self._fail(step, e)
                return
        result["model"]["folder"] = str(checkpoint.location)
        self.results[step] = {**result, "written": checkpoint.index.written, "recorded": recording.unrecorded("not sent yet")}
        self._keep(step)
        self.show(step, self.results[step])

    def _lost(self, step: int) -> bool:
        """Returns whether a checkpoint is missing. If it is missing, adds its step to `removed`."""
        if step in layout.steps(self.run):
            return False
        self.removed[step] = REMOVED
        log.warning("step %d: %s. Keep more checkpoints (checkpoint.keep), or score fewer examples", step, self.removed[step])
        return True

    def _fail(self, step: int, error: Exception) -> None:
        self.failed[step] = brief(error)
        log.error("not scoring step %d: %s", step, self.failed[step])

    def _keep(self, step: int) -> None:
        place = run_folder.benchmark(self.run, self.benchmark.suite.name, step)
        place.write((json.dumps(self.results[step], indent=1) + "\n").encode())

    def _send(self) -> None:
        """Sends MLflow the results that MLflow doesn't have yet. Raises TrackingError if MLflow doesn't answer."""
        mlflow = mlflow_id.record(self.run)
        for step, result in sorted(self.results.items()):
            if "run_id" not in mlflow or result["recorded"]["run_id"] is not None:
                continue
            sent = {key: value for key, value in result.items() if key not in ("recorded", "written")}
            sent["model"] = result["model"] | {"run_id": mlflow["run_id"], "step": step}
            result["recorded"] = recording.record(mlflow["uri"], sent)
            self._keep(step)

    def _tag_later_versions(self) -> None:
        """Adds the scores to model versions that were registered after MLflow received the scores, such as the version of the
        last step."""
        mlflow = mlflow_id.record(self.run)
        sent = {step: one for step, one in self.results.items() if one["recorded"]["run_id"] is not None}
        if "run_id" not in mlflow or not sent:
            return
        try:
            tagged = recording.tag(mlflow["uri"], mlflow["run_id"], sent)
        except TrackingError as e:
            log.warning("MLflow doesn't accept the scores of registered versions (%s). Run the command again", brief(e))
            return
        for step, versions in tagged.items():
            if versions != sent[step]["recorded"]["versions"]:
                sent[step]["recorded"]["versions"] = versions
                self._keep(step)

    def _try_to_send(self, now: float) -> None:
        """Sends new results to MLflow. After a failure, waits RETRY_S seconds before the next attempt."""
        if now < self._again:
            return
        try:
            self._send()
        except TrackingError as e:
            self._again = now + RETRY_S
            log.warning("MLflow doesn't accept the scores yet, so heliostat sends them again later (%s)", brief(e))


def alive(run: Location) -> bool:
    """Returns whether a driver is training the run now, according to the records in the run's folder."""
    last = liveness.last(run)
    return last is not None and last.outcome not in ("finished", "interrupted") and liveness.lives(last)


def summary(followed: Followed) -> Result:
    """Summarizes the scores of each step, and the steps without a score."""
    steps = [
        {"step": step, "scores": {row["task"]: row["score"] for row in result["tasks"]}, "average": result["average"]["centred"],
         "recorded": result["recorded"]}
        for step, result in sorted(followed.results.items())
    ]  # fmt: skip
    reasons = {"removed": followed.removed, "incomplete": followed.incomplete, "failed": followed.failed}
    missed = {name: {str(step): why for step, why in sorted(steps.items())} for name, steps in reasons.items()}
    return {"run_folder": str(followed.run), "suite": followed.benchmark.suite.name, "steps": steps, **missed}
