"""Detects the kind of a YAML file by its keys, so that a file given to the wrong command gets an error that names the right one.

A file is of a kind if it has one of the keys that only this kind has. What cannot be detected is left to the schema's own errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heliostat.errors import ConfigError

KEYS = {  # in this order: a sweep may be written with keys of a job
    "cluster": ("cluster_name", "provider", "available_node_types", "apiVersion"),
    "pipeline": ("pipeline",),
    "sweep": ("space", "searcher", "scheduler"),
    "job": ("recipe",),
    "suite": ("tasks",),
}
NAMES = {"cluster": "a cluster file", "pipeline": "a pipeline", "sweep": "a sweep", "job": "a job", "suite": "a suite"}
COMMANDS = {
    "cluster": "heliostat cluster up {0}`, or name it with `--cluster {0}",
    "pipeline": "heliostat prepare {0}",
    "sweep": "heliostat tune {0}",
    "job": "heliostat train {0}",
    "suite": "heliostat benchmark MODEL {0}",
}


def kind_of(raw: Any) -> str | None:
    """Detects the kind of a file's content; None if its keys do not show it."""
    keys = set(raw) if isinstance(raw, dict) else set()
    return next((kind for kind, own in KEYS.items() if keys & set(own)), None)


def require(wanted: str, path: Path, raw: Any) -> None:
    """Raises ConfigError if the file is clearly of another kind than `wanted`; it names the command that takes it."""
    found = kind_of(raw)
    if found and found != wanted and not set(raw) & set(KEYS[wanted]):
        command = COMMANDS[found].format(path)
        raise ConfigError(f"{path}: is {NAMES[found]}, and {NAMES[wanted]} is wanted here; use `{command}`")
