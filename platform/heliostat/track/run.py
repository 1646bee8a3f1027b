"""The owner of one MLflow run: everything that a run leaves in MLflow goes through here, from the driver's process.

It writes through MlflowClient with an explicit run id, which is kept beside the checkpoints (`run.json`), so that a resumed
run continues the same MLflow run. Events are queued and written by one thread: a server that is slow, or away, never slows
training. What it does not take waits (`outbox`) and is tried again; at the end for AWAY_S, and then by the run's next command.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from heliostat import goodput, workspace
from heliostat.data.manifest import Manifest
from heliostat.errors import HeliostatError, TrackingError
from heliostat.spec import Job
from heliostat.storage import Location
from heliostat.track import outbox
from heliostat.track.points import Point, points

log = logging.getLogger(__name__)

RECORD = "run.json"
PACKAGES = ("heliostat", "ray", "torch", "deepspeed", "transformers", "diffusers", "pyarrow", "mlflow", "numpy")
AWAY_S = 120.0  # how long the end of a command waits for an MLflow that does not answer
IMAGES = 500  # that wait for MLflow; with more the oldest go
EXCHANGE_S = 300.0  # the longest that an exchange which has begun may take
PAUSE_S, PAUSE_MAX_S = 0.5, 15.0  # between two tries; each is twice as long as the one before
# MLflow's client by itself tries for minutes, in which nothing could be done
CLIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


def record(run: Location) -> dict[str, Any]:
    """What the run's folder knows of its MLflow run; empty for a new run."""
    try:
        return json.loads(run.join(RECORD).read())
    except FileNotFoundError:
        return {}


class RunOwner:
    """Use: `owner = RunOwner(job, manifests)`, `owner.post(event)` at will, then `owner.finish(...)`."""

    def __init__(self, job: Job, manifests: list[Manifest], tags: dict[str, str] | None = None) -> None:
        """`tags`: of a new run, beside its own; one with `mlflow.parentRunId` is a nested run."""
        self.job, self.manifests, self._tags = job, manifests, tags or {}
        self.run_id = self._made = ""
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self._answers = threading.Event()  # MLflow's last answer was a good one
        self._fault: Exception | None = None  # of the last exchange
        self._since = 0.0  # of an outage
        self._patient = True  # until somebody has waited in vain
        self._end: dict[str, Any] | None = None
        self._images: deque[tuple[str, int, bytes]] = deque(maxlen=IMAGES)  # (name, step, PNG) that MLflow has not got yet
        self._thread = threading.Thread(target=self._write, name="mlflow", daemon=True)

    def post(self, event: dict[str, Any]) -> None:
        self._queue.put(event)
        if event["kind"] == "steps":
            self._start()

    def _start(self) -> None:
        """Not before the first step: importing MLflow takes seconds, which starting workers would wait for."""
        if not self._thread.ident:
            self._thread.start()

    def client(self) -> Any:
        """The MlflowClient, once MLflow has answered; TrackingError if it does not for AWAY_S."""
        self.post({"kind": "hello"})  # the thread may wait for a first event
        self._start()
        if not self._answers.wait(AWAY_S):
            self._patient = False
            raise TrackingError(f"{self._away()}; use --resume when it answers again: training is not repeated") from self._fault
        return self._client

    def describe(self, model_uri: str, samples: list[tuple[str, str]]) -> None:
        """The run's model, and what it wrote for each prompt."""
        from mlflow.exceptions import MlflowException

        client = self.client()
        try:
            client.set_tag(self.run_id, "heliostat.model_uri", model_uri)
            client.log_table(self.run_id, {"prompt": [p for p, _ in samples], "text": [t for _, t in samples]}, "samples.json")
        except MlflowException as e:
            raise TrackingError(f"mlflow.uri: {self.job.mlflow.uri} failed ({e}); use --resume: training is not repeated") from e

    def finish(self, status: str, reason: str, report: dict[str, Any], tags: dict[str, str] | None = None) -> None:
        """Writes all that waits, the run's goodput, tags, and its status: FINISHED, FAILED or KILLED.

        If MLflow stays away for AWAY_S, the run's next command does it: TrackingError for a run that is FINISHED.
        """
        step = max(a["reached"] for a in report["attempts"])
        self.post({"kind": "goodput", "report": report, "step": step, "at": time.time()})
        self.post({"kind": "end", "status": status, "reason": reason, "report": report, "tags": tags or {}})
        self._start()
        self._thread.join(AWAY_S + EXCHANGE_S)
        if self._fault or self._thread.is_alive():
            told = f"{self._away()}; what it has not got is in {self.job.run_folder.join(outbox.FILE)}, and the next `heliostat "
            told += "train --resume` of this run logs it"
            if status == "FINISHED":
                raise TrackingError(told) from self._fault
            log.error(told)

    def _away(self) -> str:
        reason = str(self._fault or "no answer").strip().splitlines()[0]
        return f"mlflow.uri: {self.job.mlflow.uri} did not take the run's metrics for {AWAY_S:.0f} s ({reason[:200]})"

    # the writing thread ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Until the end was posted and written, or it is too late for that."""
        pause, deadline = 0.0, float("inf")
        box = outbox.Outbox(self.job.run_folder, self._send, self._known)
        while True:
            for event in self._gather(pause):
                box.add(points(event))
                self._images.extend((name, event["step"], png) for name, png in event.get("images", {}).items())
            if self._end and deadline == float("inf"):
                deadline = time.monotonic() + (AWAY_S if self._patient else 0.0)
            try:
                self._deliver(box)
            except Exception as e:  # noqa: BLE001 (whatever MLflow, or the store of the run's folder, raises)
                pause = min(PAUSE_MAX_S, max(PAUSE_S, 2 * pause))
                self._failed(e, box)
            else:
                pause, self._fault = 0.0, None
                self._answers.set()
            if self._end and (self._fault is None or time.monotonic() > deadline):
                return

    def _gather(self, pause: float) -> list[dict[str, Any]]:
        """The next events; after a failed exchange those of the pause, which the end of the run cuts short."""
        events, until = list[dict[str, Any]](), time.monotonic() + pause
        while True:
            try:
                left = until - time.monotonic()
                event = self._queue.get(timeout=max(0.0, left)) if pause or events else self._queue.get()
            except queue.Empty:
                return events
            if event["kind"] == "end":
                self._end = event
                return events
            events.append(event)

    def _deliver(self, box: outbox.Outbox) -> None:
        if not self.run_id:
            self._open()
        waiting = len(box)
        box.flush()
        self._log_images()
        if self._fault:
            away = time.monotonic() - self._since
            log.warning("MLflow answers again after %.0f s: it has the %d metrics that waited", away, waiting)
        if self._end:
            self._close(self._end)

    def _failed(self, error: Exception, box: outbox.Outbox) -> None:
        if self._fault is None:
            self._since = time.monotonic()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("MLflow does not answer: metrics are kept until it does, and training goes on (%s)", reason[:200])
        self._fault = error
        self._answers.clear()
        try:
            box.keep()
        except (HeliostatError, OSError) as e:
            log.warning("what waits for MLflow could not be kept in the run's folder: %s", e)

    def _close(self, end: dict[str, Any]) -> None:
        """The run's goodput as a whole, and a figure; its status."""
        try:
            self._client.log_dict(self.run_id, end["report"], "goodput.json")
            self._client.log_figure(self.run_id, goodput.chart(end["report"]), "goodput.png")
        except Exception as e:  # noqa: BLE001 (whatever MLflow raises: the run's status must be written all the same)
            log.error("MLflow refused the goodput of run %s: %s", self.run_id, e)
        if end["reason"]:
            self._client.set_tag(self.run_id, "heliostat.reason", end["reason"][:5000])
        for key, value in end["tags"].items():
            self._client.set_tag(self.run_id, key, value)
        self._client.set_terminated(self.run_id, end["status"])

    def _open(self) -> None:
        for name, value in CLIENT.items():
            os.environ.setdefault(name, value)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a warning for every try
        import mlflow

        job = self.job
        self._client = mlflow.MlflowClient(tracking_uri=job.mlflow.uri)
        found = record(job.run_folder)
        if found.get("run_id") and found.get("uri") == job.mlflow.uri:
            self._client.update_run(found["run_id"], status="RUNNING")
            self.run_id = found["run_id"]
            return
        if not self._made:  # an earlier try may have come to this point
            experiment = self._client.get_experiment_by_name(job.mlflow.experiment)
            experiment_id = experiment.experiment_id if experiment else self._create_experiment()
            self._made = self._client.create_run(experiment_id, run_name=job.name, tags=_tags(job) | self._tags).info.run_id
        params = [mlflow.entities.Param(k, v) for k, v in flatten(job.dump()).items()]
        for i in range(0, len(params), 100):
            self._client.log_batch(self._made, params=params[i : i + 100])
        self._client.log_dict(self._made, job.dump(), "job.json")
        self._log_inputs(self._made)
        job.run_folder.join(RECORD).write(json.dumps({"run_id": self._made, "uri": job.mlflow.uri, "name": job.name}).encode())
        self.run_id = self._made

    def _create_experiment(self) -> str:
        uri = self.job.mlflow.uri
        place = None
        if uri.startswith("sqlite:///"):  # MLflow's own default is a folder below wherever the process happens to run
            place = str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / self.job.mlflow.experiment)
        return self._client.create_experiment(self.job.mlflow.experiment, artifact_location=place)

    def _log_inputs(self, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for source, manifest in zip(self.job.data.sources, self.manifests, strict=True):
            profile = json.dumps({"rows": manifest.rows, "tokens": manifest.tokens, "chunks": len(manifest.chunks)})
            # MLflow keeps at most 36 characters of a digest; the whole one is in the tag
            dataset = Dataset(manifest.meta.get("name", manifest.location.name), manifest.digest[:36], "heliostat",
                              json.dumps({"uri": source.path}), profile=profile)  # fmt: skip
            tags = [
                InputTag("mlflow.data.context", "training"),
                InputTag("digest", manifest.digest),
                InputTag("weight", str(source.weight)),
            ]
            inputs.append(DatasetInput(dataset, tags))
        self._client.log_inputs(run_id, datasets=inputs)

    def _send(self, new: list[Point]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self.run_id, metrics=[Metric(p.key, p.value, int(p.at * 1000), p.step) for p in new])

    def _known(self) -> dict[str, int]:
        """The last place that MLflow has of each metric."""
        found = self._client.get_run(self.run_id).data.to_proto().metrics
        return {m.key: Point(m.key, m.value, m.timestamp / 1000, m.step).place for m in found}

    def _log_images(self) -> None:
        while self._images:
            name, step, png = self._images[0]
            with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
                file = Path(folder) / f"step-{step:08d}.png"
                file.write_bytes(png)
                self._client.log_artifact(self.run_id, str(file), f"images/{name}")
            self._images.popleft()


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys to strings, as MLflow's params want them (values are cut at 6,000 characters)."""
    if isinstance(tree, dict):
        items = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in tree.items()]
    elif isinstance(tree, list):
        items = [(f"{prefix}.{i}", v) for i, v in enumerate(tree)]
    else:
        return {prefix: str(tree)[:6000]}
    return {k: v for key, value in items for k, v in flatten(value, key).items()}


def _tags(job: Job) -> dict[str, str]:
    tags = {"heliostat.name": job.name, "heliostat.recipe": job.recipe, "heliostat.run_folder": str(job.run_folder)}
    for package in PACKAGES:
        try:
            tags[f"heliostat.version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["heliostat.dirty"] = str(bool(_git("status", "--porcelain")))
    return tags


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", *command], cwd=workspace.root(), capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
