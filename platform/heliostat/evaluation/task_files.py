"""Reads lm-eval's task files (YAML) and their data sets from a folder or S3, as plain data. No code from these files runs.

lm-eval itself calls functions that a task file names with `!function`, and loads any metric or class that the file names. If the
task file comes from somebody else, lm-eval would run foreign code. So heliostat rejects all such files, even your own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from heliostat import schema
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location, is_inside

SUFFIXES = (".yaml", ".yml")
FUNCTION = re.compile(r"^[^#\n]*?:\s*!function\b", re.MULTILINE)
MOST_BYTES = 4 << 20  # maximum size of a task file
READERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}
BUILDERS = sorted(set(READERS.values()))  # readers of the library `datasets`; other readers may run code, or read pickles
KWARGS = ("data_files", "field", "sep", "delimiter", "column_names", "trust_remote_code")


def download(folder: Location, to: Path) -> Path:
    """Returns the folder of the task files. If the folder is in S3, first copies its YAML files to `to`, at the same relative
    paths.

    Raises ConfigError if a local folder doesn't exist.
    """
    if not folder.is_s3:
        if not Path(folder.path).is_dir():
            raise ConfigError(f"folder: {folder}: no such folder. Set folder to the folder with the task files")
        return Path(folder.path)
    names = [name for name, size in folder.files() if name.endswith(SUFFIXES) and size <= MOST_BYTES and is_inside(name)]
    for name in names:
        place = to / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(folder.join(name).read())
    return to


def find(root: Path, name: str) -> Path | None:
    """Searches a folder and its subfolders, except hidden folders, for the file of a task. Returns None if no file has this task.
    Raises ConfigError if two files have this task."""
    files = naming(root, "task", name)
    if len(files) > 1:
        raise ConfigError(f"tasks: {name!r} is in two files, {files[0]} and {files[1]}. Rename one of the two tasks")
    return files[0] if files else None


def naming(root: Path, key: str, name: str) -> list[Path]:
    """Lists the files below a folder with the top-level line `key: name`."""
    line = re.compile(rf"^{key}\s*:\s*([\"']?){re.escape(name)}\1\s*(#.*)?$", re.MULTILINE)
    return [path for path in _files(root) if line.search(path.read_text(encoding="utf-8", errors="replace"))]


def names(root: Path) -> list[str]:
    """Lists the names of all tasks below a folder."""
    line = re.compile(r"^task\s*:\s*[\"']?([\w.-]+)[\"']?\s*(?:#.*)?$", re.MULTILINE)
    return sorted({n for path in _files(root) for n in line.findall(path.read_text(encoding="utf-8", errors="replace"))})


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(root).parts)
        if path.suffix in SUFFIXES and not hidden and path.is_file() and path.stat().st_size <= MOST_BYTES:
            yield path


def read(root: Path, path: Path, seen: tuple[Path, ...] = ()) -> dict[str, object]:
    """Reads a task file. As in lm-eval, the file's own keys override the keys of the files that it includes.

    Raises ConfigError if a file is invalid, includes itself or a file outside `root`, or contains a `!function`.
    """
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: include: includes itself. Remove one of the includes")
    if not path.is_relative_to(root.resolve()):
        raise ConfigError(f"{seen[-1] if seen else path}: include: {path} is outside {root}. Copy the file into this folder")
    if path.is_file() and FUNCTION.search(path.read_text(encoding="utf-8", errors="replace")):
        raise ConfigError(
            f"{path}: contains a `!function`, and heliostat doesn't run code of task files. Write a Jinja "
            "template, or do the work when you make the data set"
        )
    own = schema.read_yaml(path)
    included = own.pop("include", [])
    merged: dict[str, object] = {}
    for other in included if isinstance(included, list) else [included]:
        if not isinstance(other, str):
            raise ConfigError(f"{path}: include: {other!r} isn't a path. Use the name of a file in the same folder")
        inherited = read(root, path.parent / other, (*seen, path))
        merged |= {key: value for key, value in inherited.items() if key not in ("task_list",)}
    return merged | own


def placed(config: dict[str, object], folder: Location, cache: Path, where: object) -> dict[str, object]:
    """Returns a task's configuration, in which local paths replace the paths of the data set's files. Raises ConfigError if a
    file is missing.

    A relative path starts at the folder of the task files, as for `lm_eval` in that folder. Files in S3 are copied to `cache`. A
    name that isn't a path is a data set of the Hugging Face Hub. To load this data set, the machine needs network access.
    """
    path, kwargs = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if not isinstance(path, str) or not isinstance(kwargs, dict):
        raise ConfigError(f"{where}: dataset_path: {path!r} isn't a data set. Use a reader ({', '.join(BUILDERS)}), or a folder")
    if path in BUILDERS:
        options = _of_files(kwargs, folder, cache, where)
    elif (place := _folder(path, folder, where)) is not None:
        path, options = _of_folder(place, cache, where)
    elif "/" in path and not path.startswith((".", "/")) and not urlsplit(path).scheme:
        return config  # a data set of the Hub
    else:
        raise ConfigError(
            f"{where}: dataset_path: {path!r} is neither a folder with a data set nor a reader ({', '.join(BUILDERS)})"
        )
    return config | {"dataset_path": path, "dataset_kwargs": options | {"cache_dir": str(cache / "arrow")}}


def _of_files(kwargs: dict[str, object], folder: Location, cache: Path, where: object) -> dict[str, object]:
    """Replaces the paths in `data_files` with local paths. The value of `data_files` is a path or a list of paths, or it maps
    each split to a path or a list of paths."""
    if unknown := [key for key in kwargs if key not in KWARGS]:
        raise ConfigError(f"{where}: dataset_kwargs: {unknown[0]!r} isn't supported. Use {', '.join(KWARGS[:-1])}")
    files = kwargs.get("data_files")
    if not files:
        raise ConfigError(f"{where}: dataset_kwargs: data_files is required. Set it to a file, or to one file for each split")

    def local(value: object) -> object:
        if isinstance(value, dict):
            return {split: local(one) for split, one in value.items()}
        if isinstance(value, list):
            return [local(one) for one in value]
        if not isinstance(value, str):
            raise ConfigError(f"{where}: data_files: {value!r} isn't a path. Write a path, or a list of paths")
        place = _place(value, folder, where)
        return str(_fetched(place, cache, where))

    return {key: value for key, value in kwargs.items() if key != "trust_remote_code"} | {"data_files": local(files)}


def _place(value: str, folder: Location, where: object) -> Location:
    if urlsplit(value).scheme or value.startswith("/"):
        return Location(value)
    try:
        return folder.join(value)
    except DataError as e:
        raise ConfigError(
            f"{where}: {value!r} is outside {folder}. Copy the file into this folder, or write its absolute path"
        ) from e


def _fetched(place: Location, cache: Path, where: object) -> Path:
    """Returns a file's local path. If the file is in a store, first copies the file to `cache`. Raises ConfigError if the file
    doesn't exist."""
    if not place.exists():
        raise ConfigError(f"{where}: data_files: {place}: no such file. Put the file there, or use another file")
    if not place.is_s3:
        return Path(place.path)
    copy = cache / "data" / hashlib.sha256(place.uri.encode()).hexdigest()[:16] / place.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(place.read())
    return copy


def _folder(path: str, folder: Location, where: object) -> Location | None:
    place = _place(path, folder, where)
    return place if place.files() else None


def _of_folder(place: Location, cache: Path, where: object) -> tuple[str, dict[str, object]]:
    """Returns (reader, options) for a folder's splits. A file's name shows its split, for example `test.jsonl` or
    `test-00000-of-00002.parquet`.

    Raises ConfigError unless all files have the same format.
    """
    named = [name for name, _ in place.files() if Path(name).suffix in READERS and not Path(name).name.startswith(".")]
    readers = {READERS[Path(name).suffix] for name in named}
    if len(readers) != 1:
        problem = f"files of several kinds ({', '.join(sorted(readers))})" if readers else f"no file of {', '.join(READERS)}"
        raise ConfigError(
            f"{where}: dataset_path: {place} holds {problem}. Put files of one kind there, one file per split, for example "
            f"test.jsonl"
        )
    splits: dict[str, list[str]] = {}
    for name in named:
        splits.setdefault(Path(name).name.partition(".")[0].partition("-")[0], []).append(
            str(_fetched(place.join(*name.split("/")), cache, where))
        )
    return readers.pop(), {"data_files": splits}
