"""Writes the facts of a run to MLflow: params, job, code, machines, data, parents, and checkpoints, but not its curves.

heliostat derives all facts from the job and the run's folder, so it can write the facts again at any time. If facts are missing
after an outage or a killed driver, the next `sync` adds them.

Artifacts: `job.json`, `data.json`, and `parents.json`; `attempts.json` (for each start of the workers, its step, workers,
nodes, code, and changes of the job); `code/` (differences from the commit, package versions).
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, cast

from typing_extensions import TypedDict

from heliostat.cluster import source_code
from heliostat.cluster.capacity import LivingNode
from heliostat.config import spec
from heliostat.config.spec import Job
from heliostat.data import conversations
from heliostat.data.manifest import Manifest
from heliostat.recipes.auditing import MaskAudit
from heliostat.runs import consumed
from heliostat.runs.events import AttemptStarted
from heliostat.storage.records import Format, Json
from heliostat.storage.run_folder import ATTEMPTS
from heliostat.tracking.card import models_of_data, parents
from heliostat.tracking.checkpoint_models import Checkpoints
from heliostat.tracking.metrics import SPIKE
from heliostat.tracking.mlflow_client import read_json, write_json
from heliostat.tracking.tags import PARENT_RUNS, SPIKES

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient


class CommandCode(TypedDict):
    """Describes the code of a command: the commit, the digest of the difference from the commit, and the digest of the package
    versions."""

    code: dict[str, str]
    environment: str


class RecordedStart(CommandCode):
    """Describes a start of the workers. This is the format of an entry of `attempts.json`.

    `at`: seconds since the epoch. `changes`: (old, new) for each changed key of the job.
    """

    at: float
    start_step: int
    workers: int
    nodes: list[LivingNode]
    cluster: str
    changes: dict[str, tuple[str | None, str | None]]


STARTS = Format(list[dict[str, object]], "list of a run's starts", fix="Delete the file to start a new list")
MASK_AUDIT = "mask_audit.json"
SPIKES_SHOWN = 100  # maximum number of spikes in the tag (the newest)


class RunRecord:
    """Writes the facts of one run to MLflow: params, job, code, datasets, parents, and checkpoints."""

    def __init__(self, client: MlflowClient, run_id: str, job: Job) -> None:
        self.client, self.run_id, self.job = client, run_id, job
        self._checkpoints = Checkpoints(run_id, client.get_run(run_id).info.experiment_id, job.run_folder)
        self._source: source_code.SourceCode | None = None
        self._environment = ""

    def begin(self, manifests: list[Manifest], data_version: int, audit: MaskAudit | None = None) -> None:
        """Writes the facts of a new run before its first step: params, job, datasets, parents, and the audit of loss masks."""
        from mlflow.entities import Param

        masks = {"masks": {str(i): dict(source) for i, source in enumerate(audit["sources"])}} if audit else {}
        params = [Param(k, v) for k, v in params_of({**self.job.dump(), **masks}).items()]
        for i in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[i : i + 100])
        write_json(self.client, self.run_id, self.job.dump(), "job.json")
        if audit:
            write_json(self.client, self.run_id, audit, MASK_AUDIT)
        self._log_inputs(manifests, data_version)
        origins = [*parents(self.job), *models_of_data(manifests)]
        write_json(self.client, self.run_id, {"parents": origins}, "parents.json")
        if ids := [p["run_id"] for p in origins if p["run_id"]]:
            self.client.set_tag(self.run_id, PARENT_RUNS, ",".join(ids))

    def attempt(self, event: AttemptStarted) -> None:
        """Adds a start of the workers to `attempts.json`, in the run's folder and in MLflow."""
        self._checkpoints.back(event.start_step)
        place = self.job.run_folder.join(ATTEMPTS)
        cluster, code = os.environ.get("HELIOSTAT_CLUSTER", ""), self._code()
        entry: RecordedStart = {"at": event.at, "start_step": event.start_step, "workers": event.workers, "nodes": event.nodes,
                                **code,
                        "cluster": cluster, "changes": self._changes()}  # fmt: skip
        known = cast(list[RecordedStart], STARTS.read(place)) if place.exists() else []
        if entry["at"] not in [a["at"] for a in known]:
            known.append(entry)
            place.write(json.dumps(known).encode())
        write_json(self.client, self.run_id, known, ATTEMPTS)

    def sync(self, steps: int) -> None:
        """Writes to MLflow the facts that are in the run's folder after `steps` steps: checkpoints and training data."""
        self._checkpoints.sync(self.client)
        write_json(self.client, self.run_id, consumed.record(self.job.run_folder, steps), "data.json")

    def spikes(self) -> None:
        """Finds the newest loss spikes in MLflow, and writes their steps to a tag of the run."""
        if steps := sorted({m.step for m in self.client.get_metric_history(self.run_id, SPIKE)}):
            self.client.set_tag(self.run_id, SPIKES, ",".join(map(str, steps[-SPIKES_SHOWN:])))

    def _code(self) -> CommandCode:
        """Describes this command's code and package environment. Writes the files with the difference and the versions only
        once."""
        if self._source is None:
            source, packages = source_code.source(), source_code.environment()
            digest = hashlib.sha256(json.dumps(packages).encode()).hexdigest()[:12]
            write_json(self.client, self.run_id, packages, f"code/environment-{digest}.json")
            if source.dirty:
                self.client.log_text(self.run_id, source.text(), f"code/{source.digest}.diff")
            self._source, self._environment = source, digest
        return {"code": self._source.facts(), "environment": self._environment}

    def _changes(self) -> dict[str, tuple[str | None, str | None]]:
        """Compares this command's job with the run's first job. Maps each changed key to (old, new)."""
        first = read_json(self.client, self.run_id, "job.json", dict[str, Json]) or {}
        was, now = flatten(spec.renewed(first)), flatten(self.job.dump())
        return {k: (was.get(k), now.get(k)) for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)}

    def _log_inputs(self, manifests: list[Manifest], data_version: int) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        held_out = str(self.job.evaluate.fraction if self.job.evaluate else 0.0)
        for source, manifest in zip(self.job.data.sources, manifests, strict=True):
            profile = json.dumps({"rows": manifest.rows, "tokens": conversations.tokens(manifest),
                                  "chunks": len(manifest.chunks)})  # fmt: skip
            # MLflow keeps at most 36 characters of a digest; the tag has the complete digest
            dataset = Dataset(manifest.meta.get("name", manifest.location.name), manifest.digest[:36], "heliostat",
                              json.dumps({"uri": source.path}), profile=profile)  # fmt: skip
            tags = {"mlflow.data.context": "training", "digest": manifest.digest, "weight": str(source.weight),
                    "held_out_fraction": held_out, "data_version": str(data_version)}  # fmt: skip
            inputs.append(DatasetInput(dataset, [InputTag(k, v) for k, v in tags.items()]))
        self.client.log_inputs(self.run_id, datasets=inputs)


def flatten(tree: object, prefix: str = "") -> dict[str, str]:
    """Flattens a tree to a mapping from dotted keys to strings, for MLflow's params. Values are cut at 6,000 characters."""
    if isinstance(tree, dict):
        items = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in tree.items()]
    elif isinstance(tree, list):
        items = [(f"{prefix}.{i}", v) for i, v in enumerate(tree)]
    else:
        return {prefix: str(tree)[:6000]}
    return {k: v for key, value in items for k, v in flatten(value, key).items()}


def params_of(tree: object) -> dict[str, str]:
    """Flattens the job for MLflow's params. Leaves out keys without a value, because they would only clutter the params."""
    return flatten(_set(tree))


def _set(tree: object) -> object:
    if isinstance(tree, dict):
        return {k: _set(v) for k, v in tree.items() if v not in (None, "")}
    return [_set(v) for v in tree] if isinstance(tree, list) else tree
