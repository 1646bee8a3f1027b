"""The owner of one MLflow run: everything that a run leaves in MLflow goes through here, from the driver's process.

It writes through MlflowClient with an explicit run id, which is kept beside the checkpoints (`run.json`), so that a resumed
run continues the same MLflow run. Events are queued and written by one thread: a slow server never slows training.
"""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from heliostat import goodput, workspace
from heliostat.data.manifest import Manifest
from heliostat.errors import TrackingError
from heliostat.spec import Job
from heliostat.storage import Location

log = logging.getLogger(__name__)

RECORD = "run.json"
PACKAGES = ("heliostat", "ray", "torch", "deepspeed", "transformers", "diffusers", "pyarrow", "mlflow", "numpy")
BATCH = 1000  # the most metrics that MLflow takes in one call


def record(run: Location) -> dict[str, Any]:
    """What the run's folder knows of its MLflow run; empty for a new run."""
    try:
        return json.loads(run.join(RECORD).read())
    except FileNotFoundError:
        return {}


class RunOwner:
    """Use: `owner = RunOwner(job, manifests)`, `owner.post(event)` at will, then `owner.finish(...)`."""

    def __init__(self, job: Job, manifests: list[Manifest]) -> None:
        self.job, self.manifests = job, manifests
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._ready = threading.Event()
        self._fault: Exception | None = None
        self.run_id = ""
        self._resumed = False
        self._last: dict[str, int] = {}  # of each metric: the last step that is logged
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
        """The MlflowClient, once the run is open; TrackingError if it could not be opened."""
        self._start()
        self._ready.wait(timeout=300)
        if self._fault or not self.run_id:
            raise TrackingError(f"mlflow.uri: {self.job.mlflow.uri}: {self._fault or 'no answer in 300 s'}") from self._fault
        return self._client

    def log_goodput(self, report: dict[str, Any]) -> None:
        """The run's goodput at the end: its metrics, the whole report, and a figure."""
        step = max(a["reached"] for a in report["attempts"])
        self.post({"kind": "goodput", "report": report, "step": step, "at": time.time()})
        client = self.client()
        try:
            client.log_dict(self.run_id, report, "goodput.json")
            client.log_figure(self.run_id, goodput.chart(report), "goodput.png")
        except Exception as e:  # noqa: BLE001 (whatever MLflow raises: the run's status must be written all the same)
            log.error("MLflow refused the goodput of run %s: %s", self.run_id, e)

    def finish(self, status: str, reason: str = "") -> None:
        """Writes what is queued, then the run's status: FINISHED, FAILED or KILLED."""
        self._start()
        self._queue.put(None)
        self._thread.join(timeout=300)
        client = self.client()
        if reason:
            client.set_tag(self.run_id, "heliostat.reason", reason[:5000])
        client.set_terminated(self.run_id, status)

    # the writing thread ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            self._open()
        except Exception as e:  # noqa: BLE001 (whatever MLflow raises; `client` reports it)
            self._fault = e
        self._ready.set()
        while self._fault is None:
            events = [self._queue.get()]
            while not self._queue.empty():
                events.append(self._queue.get())
            try:
                self._log([e for e in events if e is not None])
            except Exception as e:  # noqa: BLE001
                log.error("MLflow refused metrics of run %s: %s", self.run_id, e)
            if None in events:
                return

    def _open(self) -> None:
        import mlflow

        job = self.job
        self._client = mlflow.MlflowClient(tracking_uri=job.mlflow.uri)
        found = record(job.run_folder)
        if found.get("run_id") and found.get("uri") == job.mlflow.uri:
            self.run_id, self._resumed = found["run_id"], True
            self._client.update_run(self.run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(job.mlflow.experiment)
        experiment_id = experiment.experiment_id if experiment else self._create_experiment()
        run = self._client.create_run(experiment_id, run_name=job.name, tags=_tags(job))
        job.run_folder.join(RECORD).write(
            json.dumps({"run_id": run.info.run_id, "uri": job.mlflow.uri, "name": job.name}).encode()
        )
        params = [mlflow.entities.Param(k, v) for k, v in flatten(job.dump()).items()]
        for i in range(0, len(params), 100):
            self._client.log_batch(run.info.run_id, params=params[i : i + 100])
        self._client.log_dict(run.info.run_id, job.dump(), "job.json")
        self._log_inputs(run.info.run_id)
        self.run_id = run.info.run_id

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

    def _log(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        for event in events:
            for name, png in event.get("images", {}).items():
                self._log_image(name, event["step"], png)
        metrics = []
        for key, value, at, step in (p for e in events for p in points(e)):
            if step > self._logged(key):
                metrics.append(Metric(key, value, int(at * 1000), step))
                self._last[key] = step
        for i in range(0, len(metrics), BATCH):
            self._client.log_batch(self.run_id, metrics=metrics[i : i + BATCH])

    def _log_image(self, name: str, step: int, png: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
            file = Path(folder) / f"step-{step:08d}.png"
            file.write_bytes(png)
            self._client.log_artifact(self.run_id, str(file), f"images/{name}")

    def _logged(self, key: str) -> int:
        """The last step that is logged of a metric, by whichever attempt: recomputed steps are not logged again."""
        if key not in self._last:
            history = self._client.get_metric_history(self.run_id, key) if self._resumed else []
            self._last[key] = max((m.step for m in history), default=0)
        return self._last[key]


def points(event: dict[str, Any]) -> list[tuple[str, float, float, int]]:
    """(metric, value, wall clock, step) that an event is logged as; `step` counts finished steps."""
    at = event.get("at", time.time())
    if event["kind"] == "steps":
        first, count = event["first"], len(event["loss"])
        each = event["seconds"] / count
        out = []
        for i in range(count):
            when = at - each * (count - 1 - i)
            for key in ("loss", "lr", "grad_norm"):
                out.append((f"train/{key}", event[key][i], when, first + i + 1))
        for key in ("tokens_per_second", "data_wait", "mfu", "bad_samples"):
            if event.get(key) is not None:
                out.append((f"train/{key}", event[key], at, first + count))
        for name, given in event["sources"].items():
            out += [(f"data/{name}/{key}", value, at, first + count) for key, value in given.items()]
        return out
    if event["kind"] == "evaluation":
        return [(f"eval/{k}", v, at, event["step"]) for k, v in event["scores"].items()]
    if event["kind"] == "goodput":
        report = event["report"]
        values = {"fraction": report["goodput"], **{f"{part}_s": seconds for part, seconds in report["parts"].items()}}
        return [(f"goodput/{k}", v, at, event["step"]) for k, v in values.items()]
    if event["kind"] == "checkpoint":
        return [("checkpoint/blocked_s", event["blocked_s"], at, event["step"])]
    return []


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
