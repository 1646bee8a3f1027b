"""Finds the pretrained models of a job. The value of each `pretrained` key in `model` is a folder, a model of the Hub, or a model
in S3 or MLflow (`storage.model_sources`).

If a folder with this name exists, heliostat uses this folder. Otherwise `ORG/NAME[/FOLDER][@REVISION]` is a model of the Hugging
Face Hub. A job's record has the model's commit, or its version in MLflow (`pinned`). Each node finds or downloads the model in
its own cache (`located`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.storage import model_sources
from heliostat.storage.hub import files, names
from heliostat.storage.hub.names import HubName

KEY = "pretrained"


def named(model: Mapping[str, Any], key: str = "model") -> Iterator[tuple[str, str]]:
    """Yields each `pretrained` key at any depth, also in lists, and its value."""
    for name, value in model.items():
        if name == KEY and isinstance(value, str):
            yield f"{key}.{name}", value
        for path, inner in _inner(value, f"{key}.{name}"):
            yield from named(inner, path)


def _inner(value: Any, path: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Lists the mappings of a value: the value itself, or the members of a list."""
    members = [(f"{path}.{number}", one) for number, one in enumerate(value)] if isinstance(value, list) else [(path, value)]
    return [(place, one) for place, one in members if isinstance(one, Mapping)]


def on_hub(job: Job) -> list[tuple[str, HubName]]:
    """Lists the keys of a job whose values are models of the Hub, each with the model's name."""
    return [(key, name) for key, value in named(job.model) if (name := hub_name(value))]


def elsewhere(job: Job) -> list[tuple[str, str]]:
    """Lists the keys of a job whose values are models in S3 or MLflow, each with its value."""
    return [(key, value) for key, value in named(job.model) if model_sources.is_source(value)]


def is_folder(value: str) -> bool:
    """Returns whether a value of a `pretrained` key is a folder, which every node must have."""
    return not model_sources.is_source(value) and hub_name(value) is None


def moves(job: Job) -> bool:
    """Returns whether the job has a model whose content may change under its name, such as a branch of the Hub or an alias."""
    return bool(on_hub(job) or elsewhere(job))


def hub_name(value: str) -> HubName | None:
    """Parses a value as the name of a model of the Hub. Returns None if the value is a folder: an existing path, or an absolute
    path."""
    return None if Path(value).exists() or model_sources.is_source(value) else names.model(value)


def pinned(job: Job) -> Job:
    """Returns the job with the commits of its Hub models, and with the versions of its models in MLflow. Raises ConfigError if
    the Hub doesn't return a commit, or if MLflow doesn't have a model."""
    return _changed(
        job, lambda key, name: str(files.resolve(key, name)), lambda value: model_sources.pinned(value, job.mlflow.uri)
    )


def as_recorded(job: Job, recorded: Mapping[str, Any]) -> Job:
    """Returns the job with the models that the resumed run recorded: the commit of each Hub model without a revision, and the
    version of each alias in MLflow."""
    written = dict(named(recorded.get("model") or {}))
    before = {key: name for key, value in written.items() if (name := names.model(value)) and name.pinned}

    def change(key: str, name: HubName) -> str:
        known = before.get(key)
        return str(known if known and name.revision == names.MAIN and name.at(known.revision) == known else name)

    versions = {value: model_sources.recorded(value, written.get(key, "")) for key, value in elsewhere(job)}
    return _changed(job, change, versions.__getitem__)


def described(job: Job) -> list[str]:
    """Describes each model of the Hub, S3, or MLflow in one line: its commit or version, and the size of its weights."""
    lines = []
    for key, value in elsewhere(job):
        size = files.readable(files.weight_bytes(model_sources.fetched(value, job.mlflow.uri)))
        lines.append(f"{key}: {value}, {size} of weights")
    for key, name in on_hub(job):
        folder = files.model(key, files.resolve(key, name), weights=False)
        lines.append(f"{key}: {name}, {files.readable(files.weight_bytes(folder))} of weights")
    return lines


def located(job: Job, weights: bool = True) -> Job:
    """Downloads the models of a job, and returns the job with their folders on this machine.

    Without `weights`, downloads only configurations and tokenizers of Hub models. Models in S3 or MLflow are always complete.
    """
    return _changed(
        job,
        lambda key, name: str(files.model(key, files.resolve(key, name), weights)),
        lambda value: str(model_sources.fetched(value, job.mlflow.uri)),
    )


def folder(value: str, store: str) -> Path:
    """Returns the folder for the value of a `pretrained` key. For a Hub model, downloads the configuration first. `store`: the
    URI of MLflow."""
    if model_sources.is_source(value):
        return model_sources.fetched(value, store)
    name = hub_name(value)
    return files.model(f"model.{KEY}", files.resolve(f"model.{KEY}", name), weights=False) if name else Path(value)


def _changed(job: Job, change: Callable[[str, HubName], str], change_source: Callable[[str], str]) -> Job:
    values = {key: change(key, name) for key, name in on_hub(job)}
    for key, value in elsewhere(job):
        try:
            values[key] = change_source(value)
        except ConfigError as e:
            raise ConfigError(f"{key}: {e}") from e
    return job.model_copy(update={"model": _replaced(job.model, values)}) if values else job


def _replaced(model: Mapping[str, Any], values: Mapping[str, str], key: str = "model") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in model.items():
        path = f"{key}.{name}"
        inner = {place: _replaced(one, values, place) for place, one in _inner(value, path)}
        if isinstance(value, list):
            out[name] = [inner.get(f"{path}.{number}", one) for number, one in enumerate(value)]
        else:
            out[name] = inner.get(path, values.get(path, value))
    return out
