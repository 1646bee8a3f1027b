"""Logs one MLflow run. The run's owner, in the driver's process, writes all data of the run to MLflow.

The owner uses MlflowClient with an explicit run id, so that a resumed run continues the same MLflow run. The id is stored next
to the checkpoints (`run.json`). One thread writes the queued events, so a slow or unreachable server never slows training.
Events that the server doesn't accept wait (`outbox`) for the next attempt. After the end of the run, attempts continue for
AWAY_S seconds. If events still wait after these seconds, the run's next command sends these events.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from heliostat.cluster import source_code
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.data.split import NEWEST
from heliostat.errors import HeliostatError, TrackingError
from heliostat.recipes.auditing import MaskAudit
from heliostat.runs import goodput
from heliostat.runs.events import (
    AttemptStarted,
    BadNodes,
    Corruption,
    Evaluation,
    Event,
    Goodput,
    LossSpike,
    Profiled,
    Saved,
    Steps,
)
from heliostat.runs.mlflow_id import record
from heliostat.storage import run_folder
from heliostat.storage.retries import Backoff
from heliostat.tracking import card, local_curves, mlflow_client, outbox, tags
from heliostat.tracking.metrics import SPIKE, points
from heliostat.tracking.mlflow_client import read_json, write_bytes, write_json
from heliostat.tracking.run_facts import RunRecord

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SAMPLES, SAVED = "samples.json", "its checkpoints and data"
AWAY, BACK = "MLflow doesn't accept metrics", "MLflow answers again"  # log lines at the start and end of an outage
PACKAGES = ("heliostat", "ray", "torch", "deepspeed", "transformers", "diffusers", "pyarrow", "mlflow", "numpy")
AWAY_S = 120.0  # if MLflow doesn't answer, a command waits this long at its end
NODES_SHOWN = 10  # maximum number of lines about bad nodes in the tag (the newest)
IMAGES = 500  # maximum number of images that wait for MLflow; above it, the oldest images are dropped
EXCHANGE_S = 300.0  # maximum duration of one exchange with MLflow
PAUSES = Backoff(0.5, 15.0)  # seconds between two attempts
NEVER = (HeliostatError, LookupError, TypeError, ValueError, AttributeError)  # errors that would occur at every attempt


class Table(TypedDict):
    data: list[list[str]]


@dataclass(kw_only=True)
class End(Event):
    """Marks the end of the command. It is the last event that a RunOwner receives, and has the run's status and goodput."""

    status: str
    reason: str
    report: goodput.GoodputReport
    tags: dict[str, str]


class RunOwner:
    """Owns one MLflow run, and writes everything in it.

    Use: `owner = RunOwner(job, manifests)`, then `owner.post(event)` for each event, then `owner.finish(...)`.
    """

    def __init__(
        self, job: Job, manifests: list[Manifest], extra: dict[str, str] | None = None, data_version: int = NEWEST
    ) -> None:
        """Prepares the run, without writing to MLflow yet.

        `extra`: tags of a new run (`mlflow.parentRunId` makes a nested run). `data_version`: the data plan's version.
        """
        self.job, self.manifests, self._tags, self._data_version = job, manifests, extra or {}, data_version
        self.audit: MaskAudit | None = None  # of the loss masks, if the recipe has one
        self.run_id = self._made = ""
        self._queue: queue.Queue[Event] = queue.Queue()
        self._answers = threading.Event()  # set if the last exchange with MLflow succeeded
        self._fault: Exception | None = None  # the error of the last exchange
        self._since = 0.0  # start of an outage
        self._patient = True  # False after a wait without success
        self._end: End | None = None
        self._images: deque[tuple[str, int, bytes]] = deque(maxlen=IMAGES)  # (name, step, PNG) that MLflow lacks
        self._facts: dict[str, Callable[[], None]] = {}  # functions that write facts that MLflow lacks, by description
        self._filled = False  # whether the queue has the curves of earlier commands
        self._bad_nodes: deque[str] = deque(maxlen=NODES_SHOWN)  # this command's lines about bad nodes
        self._thread = threading.Thread(target=self._write, name="mlflow", daemon=True)

    def post(self, event: Event) -> None:
        """Queues an event. The first event with steps starts the writing thread."""
        self._queue.put(event)
        if isinstance(event, Steps):
            self._start()

    def _start(self) -> None:
        """Starts the writing thread, if it hasn't started yet.

        Training starts the thread after the first step. MLflow's import takes seconds, and would delay the workers' start.
        """
        if not self._thread.ident:
            self._thread.start()

    def client(self) -> MlflowClient:
        """Waits until MLflow has answered, and returns the MlflowClient. Raises TrackingError after AWAY_S seconds without an
        answer."""
        self.post(Event())  # wakes the thread, which may be waiting for its first event
        self._start()
        if not self._answers.wait(AWAY_S):
            self._patient = False
            raise TrackingError(f"{self._away()}. Use --resume when MLflow answers: training isn't repeated") from self._fault
        return self._client

    def describe(self, model_uri: str | None, samples: list[tuple[str, str]]) -> None:
        """Writes the samples (prompt, generated text) and, if the run has a logged model, the model's URI.

        Raises TrackingError if MLflow rejects the data, or doesn't answer for AWAY_S seconds.
        """
        from mlflow.exceptions import MlflowException

        client = self.client()
        try:
            if model_uri is not None:
                client.set_tag(self.run_id, tags.MODEL_URI, model_uri)
            self._log_samples(client, [list(sample) for sample in samples])
        except MlflowException as e:
            raise TrackingError(f"mlflow.uri: {self.job.mlflow.uri} failed ({e}). Use --resume: training isn't repeated") from e

    def _log_samples(self, client: MlflowClient, rows: list[list[str]]) -> None:
        """Adds rows to the run's table of samples, unless the table already ends with these rows.

        MLflow's `log_table` adds the rows twice if the call is repeated, so this function replaces `log_table`.
        """
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        before = (read_json(client, self.run_id, SAMPLES, Table) or {"data": []})["data"]
        before = before[: -len(rows)] if rows and before[-len(rows) :] == rows else before
        write_json(client, self.run_id, {"columns": ["prompt", "text"], "data": [*before, *rows]}, SAMPLES)
        tables = json.loads(client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        mine = {"path": SAMPLES, "type": "table"}
        if mine not in tables:
            client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, mine]))

    def finish(self, status: str, reason: str, report: goodput.GoodputReport, closing: dict[str, str] | None = None) -> None:
        """Writes all waiting events, and the run's goodput, tags, and status (FINISHED, FAILED, or KILLED).

        If MLflow is down for AWAY_S seconds, the run's next command writes this data, and a FINISHED run raises TrackingError.
        """
        step = max(a["reached"] for a in report["attempts"])
        self.post(Goodput(report=report, step=step))
        self.post(End(status=status, reason=reason, report=report, tags=closing or {}))
        self._start()
        self._thread.join(AWAY_S + EXCHANGE_S)
        if self._fault or self._thread.is_alive():
            kept = self.job.run_folder.join(run_folder.UNLOGGED)
            lacks = f"{self._away()}. The missing metrics are in {kept}"
            fault = f"{lacks}. To log these metrics: heliostat train JOB --resume"
            if status == "FINISHED":
                raise TrackingError(fault) from self._fault
            log.error(fault)

    def _away(self) -> str:
        reason = mlflow_client.fault(self._fault) if self._fault else "no answer"
        return f"mlflow.uri: {self.job.mlflow.uri} didn't accept the run's metrics for {AWAY_S:.0f} s ({reason})"

    # the writing thread ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Writes events to MLflow until the end of the command has been written, or until the deadline for the end has passed."""
        pause, failures, deadline = 0.0, 0, float("inf")
        box = outbox.Outbox(self.job.run_folder, lambda new: mlflow_client.send(self._client, self.run_id, new), self._known)
        while True:
            for event in self._gather(pause):
                self._take(event, box)
            if self._end and deadline == float("inf"):
                deadline = time.monotonic() + (AWAY_S if self._patient else 0.0)
            try:
                self._deliver(box)
            except Exception as e:  # noqa: BLE001 (any error of MLflow, or of the run's storage)
                failures += 1
                pause = PAUSES.wait(failures)
                self._failed(e, box)
            else:
                pause, failures, self._fault = 0.0, 0, None
                self._answers.set()
            if self._end and (self._fault is None or time.monotonic() > deadline):
                return

    def _take(self, event: Event, box: outbox.Outbox) -> None:
        box.add(points(event))
        match event:
            case Evaluation():
                self._images.extend((name, event.step, png) for name, png in event.images.items())
            case AttemptStarted():
                self._facts[f"where it runs from step {event.start_step} at {event.at}"] = lambda: self._record.attempt(event)
            case LossSpike():
                self._facts["its loss spikes"] = lambda: self._record.spikes()
            case Corruption():
                self._facts["the corruption that it found"] = lambda: self._tag(tags.CORRUPTION, event.text)
            case BadNodes():
                self._bad_nodes.append(event.text)
                self._facts["its bad nodes"] = lambda: self._tag(tags.BAD_NODES, "\n".join(self._bad_nodes))
            case Profiled():
                self._facts[f"profile {event.id}"] = lambda: self._log_profile(event)
            case Saved():
                self._facts.pop(SAVED, None)  # must follow a start that went back, which forgets known checkpoints
                self._facts[SAVED] = lambda: self._record.sync(event.step)

    def _gather(self, pause: float) -> list[Event]:
        """Collects the next events from the queue, waiting for the first.

        After a failed request, collects events during the pause before the next attempt. The end of the run ends the pause.
        """
        events, until = list[Event](), time.monotonic() + pause
        while True:
            try:
                left = until - time.monotonic()
                event = self._queue.get(timeout=max(0.0, left)) if pause or events else self._queue.get()
            except queue.Empty:
                return events
            if isinstance(event, End):
                self._end = event
                return events
            events.append(event)

    def _deliver(self, box: outbox.Outbox) -> None:
        if not self.run_id:
            self._open()
        if not self._filled:
            earlier = local_curves.missing(self.job.run_folder, self._known())
            box.precede(earlier)
            if any(p.key == SPIKE for p in earlier):
                self._facts["its loss spikes"] = lambda: self._record.spikes()
            self._filled = True
        waiting = len(box)
        box.flush()
        self._log_images()
        if self._end:
            self._facts.pop(SAVED, None)  # `_close` writes these facts
        for what, write in list(self._facts.items()):
            self._try(what, write)
            del self._facts[what]
        if self._fault:
            away = time.monotonic() - self._since
            log.warning("%s after %.0f s, and has received the %d waiting metrics", BACK, away, waiting)
        if self._end:
            self._close(self._end)

    def _failed(self, error: Exception, box: outbox.Outbox) -> None:
        if self._fault is None:
            self._since = time.monotonic()
            why = mlflow_client.fault(error)
            log.warning("%s. The run keeps the metrics until MLflow accepts them, and training continues (%s)", AWAY, why)
        self._fault = error
        self._answers.clear()
        try:
            box.keep()
        except (HeliostatError, OSError) as e:
            log.warning("can't write the metrics that wait for MLflow to the run's folder: %s", e)

    def _try(self, what: str, action: Callable[[], None]) -> None:
        """Runs an action on MLflow. Logs and skips an error that would occur at every attempt.

        Raises any other error, because another attempt may succeed.
        """
        try:
            action()
        except Exception as e:
            if not isinstance(e, NEVER) and getattr(e, "error_code", "") not in outbox.HOPELESS:
                raise
            log.error("MLflow lacks a part of run %s (%s): %s", self.run_id, what, e)

    def _close(self, end: End) -> None:
        """Closes the MLflow run: checkpoints, data, goodput with a figure, reason, tags, status, and report."""
        report = end.report
        self._try(SAVED, lambda: self._record.sync(report["attempts"][-1]["reached"]))
        try:
            write_json(self._client, self.run_id, report, "goodput.json")
            self._client.log_figure(self.run_id, goodput.chart(report), "goodput.png")
        except Exception as e:  # noqa: BLE001 (any error: the run's status must still be written)
            log.error("MLflow rejected the goodput of run %s: %s", self.run_id, e)
        if end.reason or tags.REASON in self._client.get_run(self.run_id).data.tags:  # the reason from an earlier command
            self._client.set_tag(self.run_id, tags.REASON, end.reason[:5000])
        for key, value in end.tags.items():
            self._tag(key, value)
        self._client.set_terminated(self.run_id, end.status)
        self._try("its report", self._log_page)  # the report comes last, because it shows the status
        self._try("its datasets' pages", self._log_data_pages)

    def _log_page(self) -> None:
        from heliostat.tracking.report import page

        text = page.page(page.gather(self._client, self._client.get_run(self.run_id)))
        self._client.log_text(self.run_id, text, page.FILE)

    def _log_data_pages(self) -> None:
        from heliostat.tracking.report import curation

        for name, text in curation.pages(self.manifests):
            self._client.log_text(self.run_id, text, name)

    def _open(self) -> None:
        mlflow_client.set_client()
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # MLflow's client warns at every attempt
        import mlflow

        job = self.job
        self._client = mlflow.MlflowClient(tracking_uri=job.mlflow.uri)
        mlflow.set_tracking_uri(job.mlflow.uri)  # for features that exist only as functions of MLflow's module
        known = record(job.run_folder)
        if known.get("uri") != job.mlflow.uri:
            known = {"token": uuid.uuid4().hex, "uri": job.mlflow.uri, "name": job.name}
        if "run_id" in known:
            self._client.update_run(known["run_id"], status="RUNNING")
            self._client.set_tag(known["run_id"], tags.STEPS, str(job.train.steps))
            self._record = RunRecord(self._client, known["run_id"], job)
            self.run_id = known["run_id"]
            return
        job.run_folder.join(run_folder.MLFLOW_RUN).write(json.dumps(known).encode())
        self._made = self._made or self._make(known["token"])
        self._record = RunRecord(self._client, self._made, job)
        self._record.begin(self.manifests, self._data_version, self.audit)
        job.run_folder.join(run_folder.MLFLOW_RUN).write(json.dumps({**known, "run_id": self._made}).encode())
        self.run_id = self._made

    def _make(self, token: str) -> str:
        """Creates the MLflow run, unless an earlier attempt has created it, and returns the run's id."""
        experiment_id = mlflow_client.experiment(self._client, self.job.mlflow.uri, self.job.mlflow.experiment)
        for name in (tags.TOKEN, tags.FORMERLY[tags.TOKEN]):
            if runs := self._client.search_runs([experiment_id], f"tags.`{name}` = '{token}'"):
                return str(runs[0].info.run_id)
        written = {**_tags(self.job, self.manifests), **self._tags, tags.TOKEN: token}
        return str(self._client.create_run(experiment_id, run_name=self.job.name, tags=written).info.run_id)

    def _known(self) -> dict[str, int]:
        return mlflow_client.known(self._client, self.run_id)

    def _tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.run_id, key, value)

    def _log_images(self) -> None:
        while self._images:
            name, step, data = self._images[0]
            place = Path(name) if Path(name).suffix else Path("images", f"{name}.png")
            write_bytes(self._client, self.run_id, data, f"{place.with_suffix('')}/step-{step:08d}{place.suffix}")
            self._images.popleft()

    def _log_profile(self, event: Profiled) -> None:
        source, target = self.job.run_folder.join(run_folder.PROFILES, event.id), f"profiles/{event.id}"
        with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
            for name in event.files:
                with source.join(name).open() as stored, (Path(folder) / name).open("wb") as file:
                    shutil.copyfileobj(stored, file)
            self._client.log_artifacts(self.run_id, folder, target)


def _tags(job: Job, manifests: list[Manifest]) -> dict[str, str]:
    """Collects a new run's tags, for people and for `heliostat` itself: user, job, code, and package versions."""
    submitted = bool(os.environ.get("HELIOSTAT_CLUSTER"))
    written = {
        tags.NAME: job.name,
        tags.RECIPE: job.recipe,
        tags.FOLDER: str(job.run_folder),
        tags.STEPS: str(job.train.steps),
        tags.USER: source_code.user(),
        tags.SOURCE_NAME: f"heliostat submit {job.name}" if submitted else job.recipe,
        tags.SOURCE_TYPE: "JOB" if submitted else "LOCAL",
        tags.NOTE: card.note(job, manifests),
    }
    for package in PACKAGES:
        try:
            written[tags.VERSION + package] = version(package)
        except PackageNotFoundError:
            continue
    source = source_code.source()
    if source.commit:
        written |= {tags.COMMIT: source.commit, tags.DIRTY: str(source.dirty)}
    return written
