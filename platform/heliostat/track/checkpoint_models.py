"""A run's checkpoints in MLflow: logged models by reference, each with its step, scores and place in storage; never a copy.

    Checkpoints(run_id, experiment_id, run_folder).sync(client)

Call it as often as you like: each whole checkpoint is logged once, and one that retention has removed is marked as deleted.
"""

from __future__ import annotations

import time
from typing import Any

from heliostat.errors import CheckpointError
from heliostat.storage import Location

KIND = "heliostat.checkpoint"  # the logged models' type
STEP, PLACE, WRITTEN, DELETED, LOGGED = (f"heliostat.{tag}" for tag in ("step", "uri", "written", "deleted", "logged"))


class Checkpoints:
    def __init__(self, run_id: str, experiment_id: str, run: Location) -> None:
        self.run_id, self.experiment_id, self.run = run_id, experiment_id, run
        self._known: dict[int, Any] | None = None  # the newest logged model of each step
        self._settled: set[int] = set()  # steps whose logged model is that of the checkpoint in storage

    def back(self, step: int) -> None:
        """The run goes on from this step: later checkpoints will be made again."""
        self._settled = {s for s in self._settled if s <= step}

    def sync(self, client: Any) -> None:
        """Raises what MLflow or the store raise; what was done stays done."""
        from heliostat.checkpoint import layout  # with torch, which takes a second

        if self._known is None:
            self._known = {int(m.tags[STEP]): m for m in reversed(logged(client, self.experiment_id, self.run_id))}
        there = layout.steps(self.run)
        for step in set(there) - self._settled:
            try:
                index = layout.open_checkpoint(self.run, step).index
            except CheckpointError:
                continue  # not complete yet, or never
            known = self._known.get(step)
            if known and known.tags.get(WRITTEN) != str(index["written"]):  # made again, after the run went back
                self._delete(client, known)
                known = None
            if known is None or known.tags.get(LOGGED) != "true":
                self._known[step] = self._log(client, step, index, known)
            self._settled.add(step)
        for step, model in self._known.items():
            if step not in there and model.tags.get(DELETED) != "true":
                self._delete(client, model)

    def _log(self, client: Any, step: int, index: dict[str, Any], model: Any) -> Any:
        import mlflow
        from mlflow.entities import LoggedModelOutput, Metric

        from heliostat.checkpoint import layout

        tags = {STEP: str(step), PLACE: str(layout.folder(self.run, step)), WRITTEN: str(index["written"]), DELETED: "false"}
        tags |= {"heliostat.data_digest": index["data_digest"], "heliostat.receipt": index["receipt"]["chain"]}
        tags |= {"heliostat.workers": str(index["world_size"]), "heliostat.zero_stage": str(index["zero_stage"])}
        if model is None:
            model = mlflow.create_external_model(
                name=f"checkpoint-{step:08d}",
                source_run_id=self.run_id,
                tags=tags,
                model_type=KIND,
                experiment_id=self.experiment_id,
            )
        now = int(time.time() * 1000)
        metrics = [Metric(f"checkpoint/{k}", v, now, step, model_id=model.model_id)
                   for k, v in index["metrics"].items() if v is not None]  # fmt: skip
        client.log_batch(self.run_id, metrics=metrics)
        outputs = client.get_run(self.run_id).outputs.model_outputs
        if model.model_id not in {o.model_id for o in outputs}:
            client.log_outputs(self.run_id, models=[LoggedModelOutput(model.model_id, step)])
        return self._tag(client, model, LOGGED, "true")

    def _delete(self, client: Any, model: Any) -> None:
        self._tag(client, model, DELETED, "true")

    def _tag(self, client: Any, model: Any, key: str, value: str) -> Any:
        client.set_logged_model_tags(model.model_id, {key: value})
        model.tags[key] = value
        return model


def logged(client: Any, experiment_id: str, run_id: str) -> list[Any]:
    """A run's checkpoints as logged models, newest first."""
    found, token = [], None
    while True:
        page = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'", page_token=token)
        found += [m for m in page if m.model_type == KIND]
        token = page.token
        if not token:
            return sorted(found, key=lambda m: m.creation_timestamp, reverse=True)
