"""Detects the kind of a YAML file from its keys (a cluster file, pipeline, sweep, job, or suite), and reads a file of a kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from heliostat import schema
from heliostat.errors import ConfigError
from heliostat.schema import M

# Keys that only files of one kind have: one of them in a file determines its kind.
KIND_KEYS = {  # checked in this order, because a sweep may have keys of a job
    "cluster": ("cluster_name", "provider", "available_node_types", "apiVersion"),
    "pipeline": ("pipeline",),
    "sweep": ("space", "searcher", "scheduler"),
    "job": ("recipe", "train"),
    "suite": ("tasks",),
}
KIND_NAMES = {"cluster": "a cluster file", "pipeline": "a pipeline", "sweep": "a sweep", "job": "a job", "suite": "a suite"}
KIND_COMMANDS = {
    "cluster": "heliostat cluster up {0}`, or pass it with `--cluster {0}",
    "pipeline": "heliostat data prepare {0}",
    "sweep": "heliostat sweep run {0}",
    "job": "heliostat train {0}",
    "suite": "heliostat model benchmark MODEL {0}",
}


def kind_of(raw: object) -> str | None:
    """Detects the kind of a file from its keys; None if the keys fit no kind."""
    keys = set(raw) if isinstance(raw, dict) else set()
    return next((kind for kind, own in KIND_KEYS.items() if keys & set(own)), None)


def require_kind(wanted: str, path: Path, raw: object) -> None:
    """Raises ConfigError, with the right command, if a file's keys are those of a kind other than `wanted`."""
    other = kind_of(raw)
    if other and other != wanted and isinstance(raw, dict) and not raw.keys() & set(KIND_KEYS[wanted]):
        command = KIND_COMMANDS[other].format(path)
        raise ConfigError(f"{path}: is {KIND_NAMES[other]}, not {KIND_NAMES[wanted]}. Use `{command}`")


def load(model: type[M], kind: str, path: Path, settings: list[str] | None = None) -> M:
    """Reads and validates a file of a kind (`KIND_KEYS`), with settings applied. Raises ConfigError for another kind."""
    return schema.validate(model, read(model, kind, path, settings), str(path))


def read(model: type[BaseModel], kind: str, path: Path, settings: list[str] | None = None) -> dict[str, Any]:
    """Reads a file of a kind, applies settings, and replaces old names of keys. Logs each old name once per file. Raises
    ConfigError for a file of a different kind."""
    raw, changes = schema.read_yaml(path), dict[str, str]()
    require_kind(kind, path, raw)
    raw = schema.renamed(model, raw, into=changes)
    for old, new in changes.items():
        schema.log_renamed(str(path), old, new)
    return schema.apply(raw, settings or [], model)
