"""Models in MLflow: logging and registering an exported folder, and finding the folder that a person names.

A name is `models:/NAME/VERSION` (or `@ALIAS`), a run id, or a folder; a run's name works where its storage is known.
`find_run` is the same for a run's folder of checkpoints and receipts.
"""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

from heliostat import exports
from heliostat.errors import ConfigError, TrackingError
from heliostat.recipe import Recipe
from heliostat.spec import Job
from heliostat.storage import Location

log = logging.getLogger(__name__)


def log_model(job: Job, run_id: str, folder: Path, recipe: Recipe, scores: dict[str, float]) -> str:
    """Logs the folder to the run with signature and input example, registers it if the job says so; returns its URI."""
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    serving = recipe.serving()
    mlflow.set_tracking_uri(job.mlflow.uri)
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
            )
    except mlflow.exceptions.MlflowException as e:
        raise TrackingError(f"mlflow: the model in {folder} could not be logged ({e})") from e
    version = info.registered_model_version
    return f"models:/{job.mlflow.register_as}/{version}" if job.mlflow.register_as else info.model_uri


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
            outputs = client.get_run(model).outputs.model_outputs
            if not outputs:
                raise ConfigError(f"run {model} has logged no model; has it finished?")
            uri = f"models:/{outputs[-1].model_id}"
        folder = Path(mlflow.artifacts.download_artifacts(uri))
    except mlflow.exceptions.MlflowException as e:
        raise ConfigError(f"{model}: not found in {tracking_uri} ({str(e).splitlines()[0]})") from e
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
