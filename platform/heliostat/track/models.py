"""Models in MLflow: logging and registering an exported folder, and finding the folder that a person names.

A name is `models:/NAME/VERSION` (or `@ALIAS`), a run id, or a folder; a run's name works where its storage is known.
`find_run` is the same for a run's folder of checkpoints and receipts.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from pathlib import Path
from typing import Any

from heliostat import exports
from heliostat.errors import ConfigError, TrackingError
from heliostat.recipe import Recipe
from heliostat.spec import Job
from heliostat.storage import Location
from heliostat.text import brief
from heliostat.track import card, registry
from heliostat.track.checkpoints import KIND
from heliostat.track.parents import parents

log = logging.getLogger(__name__)


def log_model(job: Job, run_id: str, step: int, folder: Path, recipe: Recipe, scores: dict[str, float]) -> str:
    """Logs the folder to the run with signature and input example, registers it if the job says so; returns its URI."""
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    serving = recipe.serving()
    mlflow.set_tracking_uri(job.mlflow.uri)
    told = card.license_of(job, parents(job))
    try:
        with warnings.catch_warnings(), mlflow.start_run(run_id=run_id):
            warnings.simplefilter("ignore")
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(serving.code),
                artifacts={"model": str(folder)},
                signature=serving.signature,
                input_example=serving.example,
                registered_model_name=job.mlflow.register_as,
                params={f"eval.{k}": v for k, v in scores.items()},
                pip_requirements=list(serving.requirements),
                metadata={"license": told},
            )
        client: Any = mlflow.MlflowClient()
        client.update_run(run_id, status="RUNNING")  # the fluent run has ended it, and there is more to come
        client.set_logged_model_tags(info.model_id, {"license": told, "heliostat.step": str(step)})
        if not job.mlflow.register_as:
            return info.model_uri
        _describe(client, job, str(info.registered_model_version), step, told, (folder / card.FILE).read_text(), scores)
    except mlflow.exceptions.MlflowException as e:
        raise TrackingError(f"mlflow: the model in {folder} could not be logged ({e})") from e
    return f"models:/{job.mlflow.register_as}/{info.registered_model_version}"


def _describe(client: Any, job: Job, version: str, step: int, told: str, text: str, scores: dict[str, float]) -> None:
    """The registered version's tags, card and alias."""
    name = job.mlflow.register_as
    tags = {"license": told, "heliostat.step": str(step), **{f"heliostat.score.eval/{k}": repr(v) for k, v in scores.items()}}
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    client.update_model_version(name, version, description=text.split("---\n", 2)[-1][:5000])
    if job.mlflow.alias:
        client.set_registered_model_alias(name, job.mlflow.alias, version)
        registry.record(
            client, str(name), version, {"alias": job.mlflow.alias, "at": round(time.time(), 3), "event": "registered"}
        )


def resolve(model: str, tracking_uri: str) -> Path:
    """A local folder that `from_pretrained` loads, from whatever a person calls the model; ConfigError if there is none."""
    if Path(model).is_dir():
        if not exports.is_model(Path(model)):
            raise ConfigError(f"{model}: is a folder without a model (no config.json); make one with `heliostat export`")
        return Path(model)
    if not model.startswith("models:/") and not re.fullmatch(r"[0-9a-f]{32}", model):
        raise ConfigError(f"{model!r} is no model: give models:/NAME/VERSION, a run id (32 hex digits) or a folder")
    return _download(model, tracking_uri)


def _download(model: str, tracking_uri: str) -> Path:
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    client: Any = mlflow.MlflowClient()
    try:
        uri = model
        if not model.startswith("models:/"):
            ids = [o.model_id for o in client.get_run(model).outputs.model_outputs]
            whole = [i for i in ids if client.get_logged_model(i).model_type != KIND]
            if not whole:
                raise ConfigError(f"run {model} has logged no model; has it finished?")
            uri = f"models:/{whole[-1]}"
        folder = Path(mlflow.artifacts.download_artifacts(uri))
    except mlflow.exceptions.MlflowException as e:
        raise ConfigError(f"{model}: not found in {tracking_uri} ({brief(e)})") from e
    return folder / "artifacts" / "model"


def find_run(run: str, tracking_uri: str) -> Location:
    """A run's folder from its id or from the folder itself; ConfigError if it holds no run."""
    place = Location(run) if "/" in run or Path(run).exists() else _run_folder(run, tracking_uri)
    if not {"checkpoints", "receipts", "ledger"} & set(place.folders()):
        raise ConfigError(f"{place}: holds no run (no checkpoints, no receipts); give a run id, or a run's folder STORAGE/NAME")
    return place


def _run_folder(run_id: str, tracking_uri: str) -> Location:
    """Where the run keeps its checkpoints; ConfigError if MLflow does not know the run."""
    import mlflow

    try:
        run = mlflow.MlflowClient(tracking_uri=tracking_uri).get_run(run_id)
    except mlflow.exceptions.MlflowException as e:
        raise ConfigError(f"{run_id!r}: no such run in {tracking_uri}") from e
    if "heliostat.run_folder" not in run.data.tags:
        raise ConfigError(f"{run_id!r}: is a run of {tracking_uri} that `heliostat train` did not make")
    return Location(run.data.tags["heliostat.run_folder"])
