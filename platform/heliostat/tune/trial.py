"""Runs a trial for Ray Tune: a heliostat run (`train_with_hooks`), with its own workers, in a thread of Tune's actor.

`step` returns when the run pauses for the scheduler or ends. Otherwise it returns the current step after one second. The next
`step` lets a paused run continue. `cleanup` ends a paused run immediately. If the run is training, `cleanup` ends the run after
a checkpoint. `cleanup` returns when the run's workers, actors, and placement group no longer exist. A trial always resumes from
its run's folder. Tune's own checkpoint contains only the step, and heliostat doesn't load it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray import tune

from heliostat.checkpoint import layout, snapshots
from heliostat.config.spec import Job
from heliostat.errors import CheckpointError, ConfigError, HeliostatError, StoppedError
from heliostat.runs.events import Event, Paused, Scores, Steps, Waiting
from heliostat.storage import run_folder
from heliostat.storage.lease import Lease
from heliostat.storage.locations import Location
from heliostat.tracking.tags import PRUNED
from heliostat.training.driver.signals import Signals
from heliostat.training.stops import PausePoints
from heliostat.tune.state import Result
from heliostat.tune.trial_record import CLONE, Clone, Config, read_json

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

BEAT_S = 1.0  # seconds until a result is returned without an event
ALONE_S = 60.0  # seconds to wait for the lease of a dead driver
END_S = 240.0  # seconds to wait for a run to end after a request


@dataclass(kw_only=True)
class Over(Event):
    """Reports that the run has ended. `ended`: finished, stopped, or failed."""

    ended: str
    reason: str = ""
    step: int | None = None
    scores: Scores = field(default_factory=dict)


class Trial(tune.Trainable):
    """Trains one trial of a sweep, as a Tune trainable. `SweepState.config` builds its configuration."""

    def setup(self, config: dict[str, Any]) -> None:
        self.sent = cast(Config, config)
        self._events: queue.Queue[Paused | Waiting | Over] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._paused_at: int | None = None  # the step after which the run waits
        self._step = 0

    # Tune's side -----------------------------------------------------------------------------------------------------

    def step(self) -> Result:
        if self._thread is None:
            if self._stop_requested():
                return {"step": self._step, "ended": "stopped", "done": True}
            self._begin()
        elif self._paused_at is not None:
            self._hooks.pauses.answer(self._paused_at, go_on=True)
            self._paused_at = None
        return self._next()

    def save_checkpoint(self, checkpoint_dir: str) -> str:  # type: ignore[override]
        (Path(checkpoint_dir) / "step").write_text(str(self._step))
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: object) -> None:
        pass

    def cleanup(self) -> None:
        if self._thread is None:
            return
        if self._paused_at is not None:
            if self.sent["prunes"]:
                self._hooks.closing[PRUNED] = f"step {self._paused_at}"
            self._hooks.pauses.answer(self._paused_at, go_on=False)
        else:
            self._hooks.signals.name = "the sweep"
        self._thread.join(END_S)
        if self._thread.is_alive():
            log.error("run %s didn't end within %.0f s", self.sent["job"]["name"], END_S)

    # the run's side --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        from heliostat.training.driver.run import RunHooks

        os.chdir(self.sent["root"])
        if self.sent["cluster"]:  # so the run knows that it didn't start Ray
            os.environ["RAY_ADDRESS"] = self.sent["cluster"]
        self._job = Job.model_validate(self.sent["job"])
        signals = Signals()
        self._hooks = RunHooks(time.time(), signals, PausePoints(self.sent["pauses"]), self._hear, self.sent["tags"])
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        from heliostat.training.run import train_with_hooks

        try:
            with self._lease() as lease:
                if self.sent["clone"]:
                    lease.fence.check()
                    clone(self.sent["clone"], self._job.run_folder)
            summary = train_with_hooks(self._job, self._hooks)
            self._events.put(Over(ended="finished", step=summary["steps"], scores=summary["eval"]))
        except StoppedError as e:
            self._events.put(Over(ended="stopped", reason=str(e)))
        except Exception as e:
            if not isinstance(e, HeliostatError):
                log.exception("run %s failed", self._job.name)
            self._events.put(Over(ended="failed", reason=f"{type(e).__name__}: {e}"))

    def _lease(self) -> Lease:
        """Takes the run's lease. If a dead driver still has the lease, waits up to ALONE_S seconds, because Ray ends that
        driver's processes with a delay."""
        from heliostat.storage import lease

        deadline = time.monotonic() + ALONE_S
        while True:
            try:
                return lease.take(self._job.run_folder)
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def _hear(self, event: Event) -> None:
        """Handles an event of the run, in the run's thread: keeps the step, and queues pauses and waiting messages for
        `_next`."""
        if isinstance(event, Steps):
            self._step = event.done
        elif isinstance(event, Paused | Waiting):
            self._events.put(event)

    def _next(self) -> Result:
        """Builds the next result for Tune from the run's next event. If there is no event for BEAT_S seconds, builds the result
        from the run's current step."""
        try:
            event = self._events.get(timeout=BEAT_S)
        except queue.Empty:
            if self._stop_requested():
                self._hooks.signals.name = "the sweep"
            return {"step": self._step}
        if isinstance(event, Waiting):
            return {"step": self._step, "waits": event.text}
        result: Result = {"step": self._step if event.step is None else event.step}
        if event.scores:
            result |= {"value": float(event.scores[self.sent["metric"]]), "scores": event.scores}
        if isinstance(event, Paused):
            self._paused_at = event.step
        else:
            result |= {"done": True, "ended": event.ended, "reason": event.reason}
            assert self._thread
            self._thread.join()
        return result

    def _stop_requested(self) -> bool:
        try:
            return Location(self.sent["stop"]).exists()
        except (HeliostatError, OSError) as e:
            log.warning("can't check for a request to stop the sweep: %s", e)
            return False


def clone(wanted: Clone, run: Location) -> bool:
    """Clones a trial for PBT: copies the donor's checkpoint to the run as the newest checkpoint. Returns False if the copy
    already exists.

    The checkpoint's step becomes the run's step, and all trials of a PBT sweep have the same data plan. So the clone continues
    with the samples that come after the donor's samples. The donor's receipts up to the step are copied, so `heliostat run
    verify` succeeds for the clone. Its snapshots of averages are copied, too.
    """
    if (read_json(run.join(run_folder.CLONE), CLONE) or {}).get("id") == wanted["id"]:
        return False
    donor, step = Location(wanted["folder"]), wanted["step"]
    cloned = layout.open_checkpoint(donor, step)
    for own in layout.steps(run):
        if own >= step:
            place = layout.folder(run, own)
            place.join(layout.INDEX).delete()  # first: without its index, a half-deleted checkpoint doesn't count
            place.delete()
    if cloned.frozen:
        place = run.join(run_folder.CHECKPOINTS, cloned.frozen.location.name)
        for name in (*(file for file, _ in layout.files(cloned.frozen.index)), layout.INDEX):
            copy(cloned.frozen.location.join(name), place.join(name))
    target = layout.folder(run, step)
    for file, _ in layout.files(cloned.index):
        copy(cloned.location.join(file), target.join(file))
    for folder in (run_folder.SEGMENTS, run_folder.RECEIPTS, run_folder.QUARANTINE):
        run.join(folder).delete()
        for name, _ in donor.join(folder).files():
            if run_folder.step_of(name) <= step:
                copy(donor.join(folder, name), run.join(folder, name))
    run.join(run_folder.AVERAGES).delete()
    for snapshot in snapshots.up_to(donor, step):
        place = run_folder.averages(run, snapshot.step)
        for name in (*(file for file, _ in layout.files(snapshot.index)), layout.INDEX):
            copy(snapshot.location.join(name), place.join(name))
    copy(cloned.location.join(layout.INDEX), target.join(layout.INDEX))
    if layout.open_checkpoint(run, step).index != cloned.index:
        raise CheckpointError(f"{target}: differs from {cloned.location}, from which it was cloned")
    run.join(run_folder.CLONE).write(json.dumps(wanted).encode())
    return True


def copy(source: Location, target: Location) -> None:
    """Copies a file as a stream. The target file appears only when the copy is complete."""
    with source.open() as file:
        size = file.size()

        def fill(out: pa.NativeFile) -> None:
            file.seek(0)
            while block := file.read(16 << 20):
                out.write(block)

        target.send(fill, size)
