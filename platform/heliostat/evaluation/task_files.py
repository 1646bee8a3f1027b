"""Reads lm-eval's task files (YAML) from a folder or S3 as plain data: nothing in them is run.

lm-eval itself calls what a task file names with `!function`, and loads whatever metric or class it names. From a folder or a
store that would be foreign code, so such a file is refused, whoever it is by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heliostat import schema
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location, is_inside

SUFFIXES = (".yaml", ".yml")
FUNCTION = re.compile(r"^[^#\n]*?:\s*!function\b", re.MULTILINE)
MOST_BYTES = 4 << 20  # of a task file
ALONE = ("task", "tag", "group", "task_list")  # structure, which the tasks that include a file do not take over


def download(folder: Location, to: Path) -> Path:
    """Returns the folder if it is of this machine; else copies its YAML files to `to`, each at its own path."""
    if not folder.is_s3:
        if not Path(folder.path).is_dir():
            raise ConfigError(f"folder: {folder} is no folder; it is to hold the task files")
        return Path(folder.path)
    names = [name for name, size in folder.files() if name.endswith(SUFFIXES) and size <= MOST_BYTES and is_inside(name)]
    for name in names:
        place = to / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(folder.join(name).read())
    return to


def find(root: Path, name: str) -> Path | None:
    """Finds the file of a task below a folder, hidden folders left out; None if there is none, ConfigError if there are two."""
    found = naming(root, "task", name)
    if len(found) > 1:
        raise ConfigError(f"tasks: {name!r} is in two files, {found[0]} and {found[1]}; rename one")
    return found[0] if found else None


def naming(root: Path, key: str, name: str) -> list[Path]:
    """Lists the files below a folder that have `key: name` at their top."""
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


def read(root: Path, path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a task file, with the files that it includes below its own keys, as lm-eval does; ConfigError if it is unsound."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: include: leads back to itself; take one out")
    if not path.is_relative_to(root.resolve()):
        raise ConfigError(f"{seen[-1] if seen else path}: include: {path} lies outside of {root}; copy it there")
    if path.is_file() and FUNCTION.search(path.read_text(encoding="utf-8", errors="replace")):
        raise ConfigError(
            f"{path}: holds a `!function`, and code of task files is not run; write it as a Jinja template, "
            "or do its work when the data set is made"
        )
    own = schema.read_yaml(path)
    included = own.pop("include", [])
    merged: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        if not isinstance(other, str):
            raise ConfigError(f"{path}: include: {other!r} is no path; name a file beside this one")
        inherited = read(root, path.parent / other, (*seen, path))
        merged |= {key: value for key, value in inherited.items() if key not in ("task_list",)}
    return merged | own
