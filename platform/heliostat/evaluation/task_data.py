"""Puts the place of a task's data set into its task file: files of a folder or of S3, which are copied here first.

A relative path is taken from the folder of the task files, as by `lm_eval` run in that folder. What names no file, folder or
store is a data set of the Hugging Face hub, which needs a network.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location

READERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}
BUILDERS = sorted(set(READERS.values()))  # of the library `datasets`: the others may run code, or read pickles
KWARGS = ("data_files", "field", "sep", "delimiter", "column_names", "trust_remote_code")


def placed(config: dict[str, Any], folder: Location, cache: Path, where: object) -> dict[str, Any]:
    """Returns a task's configuration with the files of its data set in their places; ConfigError if one is missing."""
    path, kwargs = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if not isinstance(path, str) or not isinstance(kwargs, dict):
        raise ConfigError(f"{where}: dataset_path: {path!r} is no data set; name a reader ({', '.join(BUILDERS)}), or a folder")
    if path in BUILDERS:
        made = _of_files(kwargs, folder, cache, where)
    elif (place := _folder(path, folder, where)) is not None:
        path, made = _of_folder(place, cache, where)
    elif "/" in path and not path.startswith((".", "/")) and not urlsplit(path).scheme:
        return config  # of the hub
    else:
        raise ConfigError(f"{where}: dataset_path: {path!r} is no folder with a data set, and no reader ({', '.join(BUILDERS)})")
    return config | {"dataset_path": path, "dataset_kwargs": made | {"cache_dir": str(cache / "arrow")}}


def _of_files(kwargs: dict[str, Any], folder: Location, cache: Path, where: object) -> dict[str, Any]:
    """Resolves `data_files`: a path, a list of them, or one of both for each split."""
    if unknown := [key for key in kwargs if key not in KWARGS]:
        raise ConfigError(f"{where}: dataset_kwargs: {unknown[0]!r} is not taken; there are {', '.join(KWARGS[:-1])}")
    files = kwargs.get("data_files")
    if not files:
        raise ConfigError(f"{where}: dataset_kwargs: data_files is required; name a file, or one for each split")

    def local(value: Any) -> Any:
        if isinstance(value, dict):
            return {split: local(one) for split, one in value.items()}
        if isinstance(value, list):
            return [local(one) for one in value]
        if not isinstance(value, str):
            raise ConfigError(f"{where}: data_files: {value!r} is no path")
        place = _place(value, folder, where)
        return str(_fetched(place, cache, where))

    return {key: value for key, value in kwargs.items() if key != "trust_remote_code"} | {"data_files": local(files)}


def _place(value: str, folder: Location, where: object) -> Location:
    if urlsplit(value).scheme or value.startswith("/"):
        return Location(value)
    try:
        return folder.join(value)
    except DataError as e:
        raise ConfigError(f"{where}: {value!r} leads out of {folder}; copy it there, or give its absolute path") from e


def _fetched(place: Location, cache: Path, where: object) -> Path:
    """Returns the file, or its copy if it is of a store; ConfigError if it is missing."""
    if not place.exists():
        raise ConfigError(f"{where}: data_files: there is no {place}; put it there, or name another")
    if not place.is_s3:
        return Path(place.path)
    copy = cache / "data" / hashlib.sha256(place.uri.encode()).hexdigest()[:16] / place.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(place.read())
    return copy


def _folder(path: str, folder: Location, where: object) -> Location | None:
    place = _place(path, folder, where)
    return place if place.files() else None


def _of_folder(place: Location, cache: Path, where: object) -> tuple[str, dict[str, Any]]:
    """Finds the splits of a folder: `test.jsonl`, or `test-00000-of-00002.parquet`."""
    named = [name for name, _ in place.files() if Path(name).suffix in READERS and not Path(name).name.startswith(".")]
    readers = {READERS[Path(name).suffix] for name in named}
    if len(readers) != 1:
        found = f"files of several kinds ({', '.join(sorted(readers))})" if readers else f"no file of {', '.join(READERS)}"
        raise ConfigError(f"{where}: dataset_path: {place} holds {found}; give one kind, a file a split, as test.jsonl")
    splits: dict[str, list[str]] = {}
    for name in named:
        splits.setdefault(Path(name).name.partition(".")[0].partition("-")[0], []).append(
            str(_fetched(place.join(*name.split("/")), cache, where))
        )
    return readers.pop(), {"data_files": splits}
