"""Logs a run's checkpoints to MLflow as logged models by reference, never as copies: each with its step, scores and location.

    Checkpoints(run_id, experiment_id, run_folder).sync(client)

Call it as often as you like: each whole checkpoint is logged once. The logged model of one that retention has removed is deleted,
so that MLflow's UI lists what can be used; its facts stay in the run's artifact `checkpoints.json`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from heliostat.errors import CheckpointError
from heliostat.storage.locations import Location
from heliostat.text import brief
from heliostat.tracking import tags
from heliostat.tracking.artifacts import read_json
from heliostat.tracking.metrics import CHECKPOINT, renamed

KIND = "heliostat.checkpoint"  # the logged models' type
GONE = "checkpoints.json"  # the artifact: facts of those that are gone, by the id of the logged model that they had

log = logging.getLogger(__name__)


class Checkpoints:
    def __init__(self, run_id: str, experiment_id: str, run: Location) -> None:
        self.run_id, self.experiment_id, self.run = run_id, experiment_id, run
        self._known: dict[int, Any] | None = None  # the newest logged model of each step
        self._settled: set[int] = set()  # steps whose logged model is that of the checkpoint in storage

    def back(self, step: int) -> None:
        """Forgets the checkpoints after `step`, from which the run goes on: later ones will be made again."""
        self._settled = {s for s in self._settled if s <= step}

    def sync(self, client: Any) -> None:
        """Logs the complete checkpoints in storage that MLflow lacks, and deletes the logged models of those that are gone.

        Raises what MLflow or the store raise; what was done until then stays done.
        """
        from heliostat.checkpoint import layout  # with torch, which takes a second

        if self._known is None:
            before = read_json(client, self.run_id, GONE) or {}
            found = reversed(logged(client, self.experiment_id, self.run_id))
            listed = [m for m in found if not (m.model_id in before and m.tags.get(tags.DELETED) == "true")]
            self._known = {int(m.tags[tags.STEP]): m for m in listed}
        there, gone = layout.steps(self.run), list[Any]()
        for step in set(there) - self._settled:
            try:
                index = layout.open_checkpoint(self.run, step).index
            except CheckpointError:
                continue  # not complete yet, or never
            known = self._known.get(step)
            if known and tags.value(known.tags, tags.WRITTEN) != str(index["written"]):  # made again, after the run went back
                gone.append(known)
                known = None
            if known is None or tags.value(known.tags, tags.LOGGED) != "true":
                self._known[step] = self._log(client, step, index, known)
            self._settled.add(step)
        gone += [model for step, model in self._known.items() if step not in there]
        self._delete(client, gone)

    def _log(self, client: Any, step: int, index: dict[str, Any], model: Any) -> Any:
        import mlflow
        from mlflow.entities import LoggedModelOutput, Metric

        from heliostat.checkpoint import layout

        told = {tags.STEP: str(step), tags.PLACE: str(layout.folder(self.run, step)), tags.WRITTEN: str(index["written"])}
        told |= {tags.DATA_DIGEST: index["data_digest"], tags.RECEIPT: index["receipt"]["chain"]}
        told |= {tags.WORKERS: str(index["world_size"]), tags.ZERO_STAGE: str(index["zero_stage"])}
        run = client.get_run(self.run_id)
        if model is None:
            model = mlflow.create_external_model(
                name=f"checkpoint-{step:08d}",
                source_run_id=self.run_id,
                tags=tags.source(run.data.tags) | told,
                model_type=KIND,
                experiment_id=self.experiment_id,
            )
        now = int(time.time() * 1000)
        metrics = [Metric(f"{CHECKPOINT}{k}", v, now, step, model_id=model.model_id)
                   for k, v in index["metrics"].items() if v is not None]  # fmt: skip
        client.log_batch(self.run_id, metrics=metrics)
        if model.model_id not in {o.model_id for o in run.outputs.model_outputs}:
            client.log_outputs(self.run_id, models=[LoggedModelOutput(model.model_id, step)])
        return self._tag(client, model, tags.LOGGED, "true")

    def _delete(self, client: Any, gone: list[Any]) -> None:
        """Saves the facts of these checkpoints in the run's artifact `checkpoints.json`, then deletes their logged models."""
        if not gone:
            return
        kept = read_json(client, self.run_id, GONE) or {}
        client.log_dict(self.run_id, kept | {m.model_id: {**facts(m), "deleted": True} for m in gone}, GONE)
        for model in gone:
            self._hide(client, model)
            if self._known and self._known.get(step := int(model.tags[tags.STEP])) is model:
                del self._known[step]

    def _hide(self, client: Any, model: Any) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.delete_logged_model(model.model_id)
        except MlflowException as e:
            if e.error_code != "PERMISSION_DENIED":
                raise
            client.set_logged_model_tags(model.model_id, {tags.DELETED: "true"})
            log.warning("MLflow lists %s still, with the tag %s: %s", model.name, tags.DELETED, brief(e))

    def _tag(self, client: Any, model: Any, key: str, value: str) -> Any:
        client.set_logged_model_tags(model.model_id, {key: value})
        model.tags[key] = value
        return model


def facts(model: Any) -> dict[str, Any]:
    """Reads the facts of a checkpoint (step, location, workers, scores, ...) from its logged model."""
    told = model.tags
    metrics = {renamed(m.key): m.value for m in model.metrics or []}
    return {
        "step": int(told[tags.STEP]),
        "uri": told[tags.PLACE],
        "deleted": told.get(tags.DELETED) == "true",
        "workers": int(told[tags.WORKERS]),
        "zero_stage": int(told[tags.ZERO_STAGE]),
        "receipt": told[tags.RECEIPT],
        "scores": {key.removeprefix(CHECKPOINT): value for key, value in metrics.items()},
        "model_id": model.model_id,
    }


def history(client: Any, run: Any) -> list[dict[str, Any]]:
    """Lists every checkpoint that a run has ever had, deleted ones too, in the order of their steps."""
    run_id = run.info.run_id
    gone = read_json(client, run_id, GONE) or {}
    there = [facts(m) for m in reversed(logged(client, run.info.experiment_id, run_id)) if m.model_id not in gone]
    return sorted([*gone.values(), *there], key=lambda told: told["step"])


def logged(client: Any, experiment_id: str, run_id: str) -> list[Any]:
    """Lists the logged models of a run's checkpoints, newest first."""
    found, token = [], None
    while True:
        page = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'", page_token=token)
        found += [m for m in page if m.model_type == KIND]
        token = page.token
        if not token:
            return sorted(found, key=lambda m: m.creation_timestamp, reverse=True)
