"""Reads the versions of the libraries that a task's result depends on. If one of these versions changes, the task runs again."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

UNICODE = "Unicode data of Python"
READING = ("pillow", "resiliparse")
MODELS = ("tokenizers", "torch", "transformers")


def versions(names: Iterable[str] = ()) -> dict[str, str]:
    """Returns the versions of Python's Unicode data and of some distributions, by name. The version is `none` if a distribution
    isn't installed."""
    return {UNICODE: unicodedata.unidata_version, **{name: _version(name) for name in sorted(names)}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Lists the libraries whose versions have changed, for example `ftfy 6.2 -> 6.3`."""
    return [f"{name} {before[name]} -> {now[name]}" for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
