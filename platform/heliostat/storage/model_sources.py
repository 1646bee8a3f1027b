"""Finds models in S3 and in MLflow, and copies them to this machine's cache, once per content.

    s3://BUCKET/PREFIX      a folder in Hugging Face format
    models:/NAME/VERSION    a registered model in MLflow; also models:/NAME@ALIAS, and models:/ID for a logged model
    RUN                     an MLflow run (32 hex digits): the newest model that this run logged

From S3, heliostat copies only safetensors, JSON, text, and tokenizer files, as from the Hub. A model of MLflow may have code and
pickles around the model's folder, which heliostat never loads. A model in a local folder of MLflow is used in place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from heliostat.errors import ConfigError, StorageError
from heliostat.storage import local_files
from heliostat.storage.hub.files import ABOUT, BLOCK, WEIGHTS, readable
from heliostat.storage.locations import Location
from heliostat.storage.s3_client import Listed
from heliostat.text import brief

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

DEFAULT = ".heliostat/mlflow.db"  # the store that the quickstart uses
CHECKPOINT = "heliostat.checkpoint"  # MLflow type of logged models that are checkpoints, without files
S3, REGISTRY = "s3://", "models:/"
RUN = re.compile(r"[0-9a-f]{32}")
VERSION = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[\w-]+))")
COPIED = (*ABOUT, WEIGHTS)
SILENCE_S = 600.0  # to wait for another process that copies the model, since its copy last grew
COPIES = 20  # most versions of MLflow, each registered from the one before, between a name and its files


def default_uri() -> str:
    """Returns the default tracking URI: MLFLOW_TRACKING_URI, or if that isn't set, the quickstart's store in the current
    folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT).absolute()}"


def is_source(value: str) -> bool:
    """Returns whether a value names a model in S3 or in MLflow. An existing folder takes precedence over a run's id."""
    return value.startswith((S3, REGISTRY)) or bool(RUN.fullmatch(value) and not Path(value).exists())


def pinned(value: str, store: str) -> str:
    """Returns a name that stays the same: the version of an alias, and the logged model of a run. `store`: MLflow's URI.

    A folder in S3 has no versions, so its name doesn't change. Raises ConfigError if MLflow doesn't have the model.
    """
    if value.startswith(S3):
        return value
    with _asking(value, store) as client:
        if match := VERSION.fullmatch(value):
            version = match["version"] or client.get_model_version_by_alias(match["name"], match["alias"]).version
            return f"{REGISTRY}{match['name']}/{version}"
        return value if value.startswith(REGISTRY) else f"{REGISTRY}{_newest(client, value)}"


def recorded(value: str, before: str) -> str:
    """Returns the model of a job that resumes: `before`, the recorded name, if `value` is an alias of the same model."""
    now, then = VERSION.fullmatch(value), VERSION.fullmatch(before)
    return before if now and then and now["alias"] and now["name"] == then["name"] else value


def fetched(value: str, store: str) -> Path:
    """Returns the folder of a model on this machine. If the model is in S3, or in MLflow's remote storage, first copies it to the
    cache. `store`: MLflow's URI.

    Raises ConfigError if there is no such model, or if it has no safetensors.
    """
    if value.startswith(S3):
        return _of_s3(value)
    name = pinned(value, store)
    with _asking(value, store):
        return _of_mlflow(name, store)


def _newest(client: MlflowClient, run_id: str) -> str:
    """Returns the id of the newest complete model that a run logged."""
    run, token = client.get_run(run_id), None
    while True:
        page = client.search_logged_models(
            [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": False}], page_token=token,
        )  # fmt: skip
        for model in page:
            if model.status.value == "READY" and model.model_type != CHECKPOINT:
                return str(model.model_id)
        if not (token := page.token):
            raise ConfigError(f"run {run_id} has no logged model. Wait until the run has finished")


def _registry(store: str) -> str:
    return os.environ.get("MLFLOW_REGISTRY_URI") or store  # otherwise MLflow takes the registry of its own default store


def _client(store: str) -> MlflowClient:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=store, registry_uri=_registry(store))


@contextmanager
def _asking(value: str, store: str) -> Iterator[MlflowClient]:
    """Converts MLflow's errors within the context into a ConfigError of one line."""
    import mlflow

    try:
        yield _client(store)
    except mlflow.exceptions.MlflowException as e:
        raise ConfigError(f"{value}: not found in {store} ({brief(e)}). See the registered models: heliostat run ui") from e


def _of_mlflow(name: str, store: str) -> Path:
    from mlflow import artifacts

    source = _artifacts(name, store)
    local = Path(unquote(source.removeprefix("file://")))
    if local.is_dir():
        return _model_in(local, name)

    def get(to: Path) -> Path:
        return Path(artifacts.download_artifacts(source, dst_path=str(to), tracking_uri=store))

    return _model_in(_cached([store, name, source], get), name)  # a name that was deleted may have a new model


def _artifacts(name: str, store: str) -> str:
    """Returns the URI of the folder with a model's files."""
    client, source = _client(store), name
    for _ in range(COPIES):
        if not source.startswith(REGISTRY):
            return source
        if match := VERSION.fullmatch(source):
            source = str(client.get_model_version(match["name"], match["version"]).source)
        else:
            source = str(client.get_logged_model(source.removeprefix(REGISTRY)).artifact_location)
    raise ConfigError(f"{name}: after {COPIES} copies of copies, the store names no files. Register the model again")


def _model_in(folder: Path, name: str) -> Path:
    """Finds the model's folder in the files of MLflow: of a model that heliostat logged, or of the flavor `transformers`."""
    for inner in ("artifacts/model", "model", "."):
        if any((folder / inner / file).is_file() for file in ("config.json", "adapter_config.json", "model_index.json")):
            return folder / inner
    raise ConfigError(f"{name}: contains no model of transformers (no config.json). Use a model that heliostat trained")


def _of_s3(uri: str) -> Path:
    place = Location(uri)
    listed = _listed(place)
    copied = _copied(listed)
    if not any(name.endswith("config.json") or name == "model_index.json" for name, _ in copied):
        problem = "no such folder" if not listed else "isn't a model folder (no config.json)"
        raise ConfigError(f"{uri}: {problem}. Copy a model's folder there")
    if not any(name.endswith(WEIGHTS) for name, _ in copied):
        raise ConfigError(f"{uri}: has no safetensors. Save the model with save_pretrained, and copy its folder there")
    size = sum(one.size for _, one in copied)

    def get(to: Path) -> Path:
        log.info("%s: copying %s to %s", uri, readable(size), to)
        for name, one in copied:
            _copy(place.join(*name.split("/")), to.joinpath(*name.split("/")), one.size)
        if _copied(_listed(place)) != copied:
            raise StorageError(f"{uri}: the folder changed while heliostat copied it. Run the command again")
        return to

    return _cached([uri, *([name, one.size, one.etag or one.mtime_ns] for name, one in copied)], get)


def _listed(place: Location) -> list[tuple[str, Listed]]:
    """Lists the files below a folder with their paths in it."""
    return [(one.path.removeprefix(f"{place.path}/"), one) for one in place.tree()]


def _copied(listed: list[tuple[str, Listed]]) -> list[tuple[str, Listed]]:
    """Returns the files that belong to a copy. Other files of the folder, such as the logs of a run, may change meanwhile."""
    return [(name, one) for name, one in listed if name.endswith(COPIED)]


def _copy(source: Location, target: Path, size: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open() as content, target.open("wb") as file:
        if (now := content.size()) != size:
            raise StorageError(f"{source}: has {now:,} bytes, but the listing has {size:,}. Run the command again")
        for begin in range(0, size, BLOCK):
            block = min(BLOCK, size - begin)
            file.write(source.attempt(partial(content.read_at, block, begin)))


def _cached(identity: list[Any], get: Callable[[Path], Path]) -> Path:
    """Returns the folder that `get` fills, in the cache. Other processes on this machine wait for the first one, while its copy
    grows. A copy is unused for a day before another copy may remove it."""
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    entry, size = local_files.cache("models") / digest, -1
    while True:
        try:
            with local_files.alone(entry, SILENCE_S):
                return _filled(entry, get)
        except BlockingIOError as e:
            if (now := _bytes(entry)) == size:
                raise StorageError(f"{entry}: another process's copy of this model no longer grows. Run the command again") from e
            size = now
        except OSError as e:
            raise StorageError(f"{entry}: can't store the model here ({e.strerror or e}). Free some space, or set TMPDIR") from e


def _filled(entry: Path, get: Callable[[Path], Path]) -> Path:
    """Returns the complete copy in an entry, whose lock this process holds."""
    complete, part = entry / "model", entry / "partial"
    entry.mkdir(exist_ok=True)
    os.utime(entry)
    if not complete.is_dir():
        local_files.remove_unused(entry)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        get(part).rename(complete)
    return complete


def _bytes(folder: Path) -> int:
    """Counts the bytes of a folder that another process fills. Ignores what that process renames or removes meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total
