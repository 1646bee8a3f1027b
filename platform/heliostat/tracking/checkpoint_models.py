"""Logs a run's checkpoints to MLflow as logged models: step, scores, and location. The checkpoints aren't copied.

    Checkpoints(run_id, experiment_id, run_folder).sync(client)

Each complete checkpoint is logged only once, even if you call `sync` several times. If retention has removed a checkpoint, its
logged model is deleted, so that MLflow's UI lists only usable models. The checkpoint's facts stay in the run's artifact
`checkpoints.json`.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, TypedDict

from heliostat.errors import CheckpointError
from heliostat.storage import model_sources
from heliostat.storage.locations import Location
from heliostat.text import brief
from heliostat.tracking import tags
from heliostat.tracking.metrics import CHECKPOINT, renamed
from heliostat.tracking.mlflow_client import logged_models, read_json, write_json

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

    from heliostat.checkpoint.index import CheckpointIndex

KIND = model_sources.CHECKPOINT  # MLflow type of the logged models
GONE = "checkpoints.json"  # artifact with the facts of deleted checkpoints, by the id of their deleted logged model

log = logging.getLogger(__name__)


class CheckpointFacts(TypedDict):
    """Describes a checkpoint (step, location, scores). The artifact `checkpoints.json` contains these entries."""

    step: int
    uri: str
    deleted: bool
    workers: int
    zero_stage: int
    receipt: str
    scores: dict[str, float]
    model_id: str


class Checkpoints:
    """Makes the logged models of a run match the checkpoints in the run's folder."""

    def __init__(self, run_id: str, experiment_id: str, run: Location) -> None:
        self.run_id, self.experiment_id, self.run = run_id, experiment_id, run
        self._known: dict[int, LoggedModel] | None = None  # the newest logged model of each step
        self._settled: set[int] = set()  # steps whose logged model belongs to the checkpoint in storage

    def back(self, step: int) -> None:
        """Forgets the checkpoints after `step`, because the run continues from `step` and will write these checkpoints again."""
        self._settled = {s for s in self._settled if s <= step}

    def sync(self, client: MlflowClient) -> None:
        """Logs the complete checkpoints in storage that aren't in MLflow yet, and deletes the logged models of removed
        checkpoints.

        Raises the errors of MLflow and of the storage. After an error, the changes that were already made in MLflow remain.
        """
        from heliostat.checkpoint import layout  # imports torch, which takes a second

        if self._known is None:
            before, models = _gone(client, self.run_id), logged(client, client.get_run(self.run_id))
            listed = [m for m in models if not (m.model_id in before and m.tags.get(tags.DELETED) == "true")]
            self._known = {int(m.tags[tags.STEP]): m for m in listed}
        stored, gone = layout.steps(self.run), []
        for step in set(stored) - self._settled:
            try:
                index = layout.open_checkpoint(self.run, step).index
            except CheckpointError:
                continue  # the checkpoint isn't complete, or not yet
            known = self._known.get(step)
            if known and tags.value(known.tags, tags.WRITTEN) != str(index.written):  # the run went back and wrote it again
                gone.append(known)
                known = None
            if known is None or tags.value(known.tags, tags.LOGGED) != "true":
                self._known[step] = self._log(client, step, index, known)
            self._settled.add(step)
        gone += [model for step, model in self._known.items() if step not in stored]
        self._delete(client, gone)

    def _log(self, client: MlflowClient, step: int, index: CheckpointIndex, model: LoggedModel | None) -> LoggedModel:
        import mlflow
        from mlflow.entities import LoggedModelOutput, Metric

        from heliostat.checkpoint import layout

        written = {tags.STEP: str(step), tags.PLACE: str(layout.folder(self.run, step)), tags.WRITTEN: str(index.written)}
        written |= {tags.DATA_DIGEST: index.data_digest, tags.RECEIPT: index.receipt.chain}
        written |= {tags.WORKERS: str(index.world_size), tags.ZERO_STAGE: str(index.zero_stage)}
        run = client.get_run(self.run_id)
        if model is None:
            model = mlflow.create_external_model(
                name=f"checkpoint-{step:08d}",
                source_run_id=self.run_id,
                tags=tags.source(run.data.tags) | written,
                model_type=KIND,
                experiment_id=self.experiment_id,
            )
        now = int(time.time() * 1000)
        metrics = [Metric(f"{CHECKPOINT}{k}", v, now, step, model_id=model.model_id)
                   for k, v in index.metrics.items() if v is not None]  # fmt: skip
        client.log_batch(self.run_id, metrics=metrics)
        if model.model_id not in {o.model_id for o in (run.outputs.model_outputs if run.outputs else ())}:
            client.log_outputs(self.run_id, models=[LoggedModelOutput(model.model_id, step)])
        client.set_logged_model_tags(model.model_id, {tags.LOGGED: "true"})
        model.tags[tags.LOGGED] = "true"
        return model

    def _delete(self, client: MlflowClient, gone: list[LoggedModel]) -> None:
        """Saves the facts of the checkpoints in `gone` in the run's artifact `checkpoints.json`, then deletes their logged
        models."""
        if not gone:
            return
        deleted: dict[str, CheckpointFacts] = {m.model_id: {**facts(m), "deleted": True} for m in gone}
        write_json(client, self.run_id, _gone(client, self.run_id) | deleted, GONE)
        for model in gone:
            self._hide(client, model)
            if self._known and self._known.get(step := int(model.tags[tags.STEP])) is model:
                del self._known[step]

    def _hide(self, client: MlflowClient, model: LoggedModel) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.delete_logged_model(model.model_id)
        except MlflowException as e:
            if e.error_code != "PERMISSION_DENIED":
                raise
            client.set_logged_model_tags(model.model_id, {tags.DELETED: "true"})
            log.warning(
                "MLflow doesn't allow deleting the logged model %s, so it got the tag %s instead: %s",
                model.name,
                tags.DELETED,
                brief(e),
            )


def facts(model: LoggedModel) -> CheckpointFacts:
    """Reads the facts of a checkpoint (step, location, workers, scores, ...) from its logged model."""
    known = model.tags
    metrics = {renamed(m.key): m.value for m in model.metrics or []}
    return {
        "step": int(known[tags.STEP]),
        "uri": known[tags.PLACE],
        "deleted": known.get(tags.DELETED) == "true",
        "workers": int(known[tags.WORKERS]),
        "zero_stage": int(known[tags.ZERO_STAGE]),
        "receipt": known[tags.RECEIPT],
        "scores": {key.removeprefix(CHECKPOINT): value for key, value in metrics.items()},
        "model_id": model.model_id,
    }


def history(client: MlflowClient, run: Run) -> list[CheckpointFacts]:
    """Lists all checkpoints that a run ever had, including deleted checkpoints, in the order of their steps."""
    gone = _gone(client, run.info.run_id)
    present = [facts(m) for m in logged(client, run) if m.model_id not in gone]
    return sorted([*gone.values(), *present], key=lambda checkpoint: checkpoint["step"])


def logged(client: MlflowClient, run: Run) -> list[LoggedModel]:
    """Lists the logged models of a run's checkpoints, oldest first."""
    return [m for m in logged_models(client, run) if m.model_type == KIND]


def _gone(client: MlflowClient, run_id: str) -> dict[str, CheckpointFacts]:
    return read_json(client, run_id, GONE, dict[str, CheckpointFacts]) or {}
