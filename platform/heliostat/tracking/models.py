"""Manages models in MLflow: logs and registers exported folders, and finds the local folder of a model.

A model's name is `models:/NAME/VERSION` (or `models:/NAME@ALIAS`), a run id, a folder, or a model of the Hugging Face Hub
(`ORG/NAME`). An existing folder takes precedence over a name of the Hub.

`find_run` finds a run's folder, which contains checkpoints and receipts. The argument of `find_run` is a run id or the folder
itself.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from heliostat.config.spec import Job
from heliostat.errors import ConfigError, TrackingError
from heliostat.recipes import exported
from heliostat.recipes.pretrained import no_model
from heliostat.recipes.protocol import Serves
from heliostat.storage import model_sources, run_folder
from heliostat.storage.hub import files, names
from heliostat.storage.locations import Location
from heliostat.tracking import card, mlflow_client, registry, tags
from heliostat.tracking.card import parents
from heliostat.tracking.checkpoint_models import KIND
from heliostat.tracking.mlflow_client import logged_models

if TYPE_CHECKING:  # importing MLflow and torch takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

    from heliostat.checkpoint.layout import SavedCheckpoint

log = logging.getLogger(__name__)


def log_model(job: Job, run_id: str, last: SavedCheckpoint, folder: Path, recipe: Serves, scores: dict[str, float]) -> str:
    """Logs an exported folder to the run, and returns the logged model's URI. Registers this model if the job sets
    `mlflow.register_as`.

    The logged model has a signature and an input example. A checkpoint's model is logged and registered only once. Later calls
    reuse the complete results of earlier calls, and delete incomplete results. Raises TrackingError if MLflow fails.
    """
    import mlflow
    from mlflow.utils import logging_utils

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    mlflow.set_tracking_uri(job.mlflow.uri)
    license = card.license_of(job, parents(job))
    client = mlflow.MlflowClient()
    made_of = f"{last.step} {last.index.written!r}"
    try:
        model_id = _logged(client, run_id, made_of) or _log(client, run_id, made_of, folder, recipe, scores, license)
        client.update_run(run_id, status="RUNNING")  # `mlflow.start_run` has ended the run, but more writes follow
        client.set_logged_model_tags(model_id, {tags.LICENSE: license, tags.STEP: str(last.step)})
        uri = f"models:/{model_id}"
        if not job.mlflow.register_as:
            return uri
        version = _registered(client, job.mlflow.register_as, run_id, uri)
        if version is None:
            logging_utils.disable_logging()  # MLflow prints the new version, but heliostat already prints it
            try:
                version = mlflow.register_model(uri, job.mlflow.register_as, tags={tags.MADE_OF: uri})
            finally:
                logging_utils.enable_logging()
        _describe(client, job, version, last.step, license, (folder / card.FILE).read_text(), scores)
    except mlflow.exceptions.MlflowException as e:
        raise TrackingError(f"mlflow: can't log the model in {folder} ({e}). To try again, use --resume") from e
    return f"models:/{job.mlflow.register_as}/{version.version}"


def _log(
    client: MlflowClient, run_id: str, made_of: str, folder: Path, recipe: Serves, scores: dict[str, float], license: str
) -> str:
    """Logs the folder as a new pyfunc model of the run, and returns the logged model's id."""
    import mlflow

    serving, source = recipe.serving(), tags.source(client.get_run(run_id).data.tags)
    with warnings.catch_warnings(), _unchecked(), mlflow.start_run(run_id=run_id):
        warnings.simplefilter("ignore")
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(serving.code),
            artifacts={"model": str(folder)},
            signature=serving.signature,
            input_example=serving.example,
            params={f"eval.{k}": v for k, v in scores.items()},
            tags={**source, tags.MADE_OF: made_of},
            pip_requirements=list(serving.requirements),
            metadata={"license": license},
        )
    return str(info.model_id)


@contextmanager
def _unchecked() -> Iterator[None]:
    """Skips two checks of MLflow. They only produce warnings, and heliostat doesn't show these warnings.

    One check takes a second to compare the requirements with all installed packages, although a model's requirements contain no
    versions. The other check loads the complete model into this process and runs it on the input example.
    """
    from mlflow import pyfunc
    from mlflow.models import utils
    from mlflow.utils import environment

    name = "warn_dependency_requirement_mismatches"
    with (
        patch.object(pyfunc, name, create=True),
        patch.object(environment, name, create=True),
        patch.object(utils, "_validate_serving_input", create=True),
    ):
        yield


def _logged(client: MlflowClient, run_id: str, made_of: str) -> str | None:
    """Returns the id of the model that an earlier call logged completely for this checkpoint; None if there is no such model.

    Deletes models that earlier calls left incomplete.
    """
    whole = None
    for model in models_of(client, client.get_run(run_id)):
        if tags.value(model.tags, tags.MADE_OF) != made_of:
            continue
        if model.status.value == "READY":
            whole = model.model_id
        else:
            client.delete_logged_model(model.model_id)
    return whole


def models_of(client: MlflowClient, run: Run) -> list[LoggedModel]:
    """Lists a run's logged models that aren't checkpoints, oldest first, including incomplete models."""
    return [m for m in logged_models(client, run) if m.model_type != KIND]


def _registered(client: MlflowClient, name: str, run_id: str, uri: str) -> ModelVersion | None:
    """Returns the version that an earlier call registered for this logged model; None if there is no such version."""
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return next((v for v in versions if tags.value(v.tags, tags.MADE_OF) == uri), None)


def _describe(
    client: MlflowClient, job: Job, registered: ModelVersion, step: int, license: str, text: str, scores: dict[str, float]
) -> None:
    """Sets the registered version's tags, card, and alias.

    Sets the alias only the first time, because a person may have moved the alias to another version since then.
    """
    name, version = str(job.mlflow.register_as), str(registered.version)
    written = {tags.LICENSE: license, tags.STEP: str(step), **{f"{tags.SCORE}eval/{k}": repr(v) for k, v in scores.items()}}
    for key, value in written.items():
        client.set_model_version_tag(name, version, key, value)
    client.update_model_version(name, version, description=text.split("---\n", 2)[-1][:5000])
    if job.mlflow.alias and not any(entry["event"] == "registered" for entry in registry.history(registered)):
        client.set_registered_model_alias(name, job.mlflow.alias, version)
        at = round(time.time(), 3)
        registry.record(client, name, version, {"alias": job.mlflow.alias, "at": at, "event": "registered"})


def resolve(model: str, tracking_uri: str) -> Path:
    """Returns the local folder of a model for `from_pretrained`. Downloads the model if necessary.

    `model`: a folder, `s3://BUCKET/PREFIX`, `models:/NAME/VERSION`, a run id, or `ORG/NAME` of the Hugging Face Hub. Raises
    ConfigError if there is no such model.
    """
    if Path(model).exists():
        if not exported.is_model(Path(model)):
            nothing = "is a folder without a model (no config.json). Export a model: heliostat model export"
            raise ConfigError(f"{model}: {no_model(Path(model), nothing)}")
        return Path(model)
    if (name := names.model(model)) and not re.fullmatch(r"[^/]+/\d+", model):  # NAME/NUMBER is more likely a version in MLflow
        pinned = files.resolve("MODEL", name)
        log.info("%s: using this model of the Hugging Face Hub", pinned)
        return files.model("MODEL", pinned)
    if not model_sources.is_source(model):
        what = "a run id (32 hex digits), s3://BUCKET/PREFIX, a model's folder, or ORG/NAME of the Hugging Face Hub"
        raise ConfigError(f"{model!r}: no such folder, and not a run id. Pass models:/NAME/VERSION, {what}")
    with nullcontext() if model.startswith(model_sources.S3) else mlflow_client.asking(tracking_uri):
        folder = model_sources.fetched(model, tracking_uri)
    if (folder / "adapter_config.json").is_file() and not exported.is_model(folder):
        raise ConfigError(f"{model}: {no_model(folder)}")
    return folder


def find_run(run: str, tracking_uri: str) -> Location:
    """Returns a run's folder. `run`: the run's id, or the folder itself. Raises ConfigError if the folder doesn't contain a
    run."""
    if "/" in run or Path(run).exists():
        place = Location(run)
    else:
        with mlflow_client.asking(tracking_uri):
            known = mlflow_client.find(mlflow_client.connect(tracking_uri), run, tracking_uri)
        place = Location(known.data.tags[tags.FOLDER])
    if not {run_folder.CHECKPOINTS, run_folder.RECEIPTS, run_folder.LEDGER} & set(place.folders()):
        raise ConfigError(f"{place}: isn't a run (no checkpoints, no receipts). Pass a run id, or a run's folder STORAGE/NAME")
    return place
