"""Reads and hashes the files in a stage's keys: lists of words and domains, and evaluation sets.

A stage lists these keys, and its keys for models, in `Stage.paths`. `shipping` copies the files to nodes that don't have them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from heliostat.errors import ConfigError

Paths = str | list[str] | dict[str, str] | None

_digests: dict[tuple[str, int, int, int, int], str] = {}  # SHA-256 by a file's path, inode, size, and times


def read(key: str, path: str) -> bytes:
    """Reads the file at the path in a key. Raises ConfigError, which begins with the key, if the file can't be read."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise _unreadable(key, path, e) from e


def entries(key: str, path: str) -> list[str]:
    """Reads a list with one entry per line, without empty lines, and without lines that begin with #.

    Raises ConfigError if the file can't be read, isn't UTF-8, or has no entry.
    """
    try:
        lines = read(key, path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{key}: {path!r} isn't UTF-8 (byte {e.start:,}). Convert the file to UTF-8") from e
    listed = [entry for line in lines if (entry := line.strip()) and not entry.startswith("#")]
    if not listed:
        raise ConfigError(f"{key}: {path!r} has no entry. Write one entry per line")
    return listed


def digest(key: str, path: str) -> str:
    """Returns the SHA-256 of the file at the path in a key. A process reads an unchanged file only once.

    Raises ConfigError if the file can't be read, or changes while heliostat reads it.
    """
    try:
        state = _state(path)
        if state not in _digests:
            with Path(path).open("rb") as file:
                hexdigest = hashlib.file_digest(file, "sha256").hexdigest()
            if _state(path) != state:
                raise ConfigError(
                    f"{key}: {path!r} changed while heliostat read this file. Don't change the file, and run the command again"
                )
            _digests[state] = hexdigest
    except OSError as e:
        raise _unreadable(key, path, e) from e
    return _digests[state]


def digests(identity: Mapping[str, object], stage: object, *keys: str) -> dict[str, object]:
    """Returns `identity` with the digests of the files in these keys instead of paths, for stages that don't list their keys in
    `Stage.paths`."""
    return {**identity, **{key: mapped(getattr(stage, key), partial(digest, key)) for key in keys}}


def mapped(paths: Paths, change: Callable[[str], str]) -> Paths:
    """Applies `change` to each path of a key: one path, a list of paths, or a mapping of names to paths."""
    if isinstance(paths, dict):
        return {name: change(path) for name, path in paths.items()}
    return change(paths) if isinstance(paths, str) else paths and [change(path) for path in paths]


def _state(path: str) -> tuple[str, int, int, int, int]:
    stat = Path(path).stat()
    return str(Path(path).absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _unreadable(key: str, path: str, error: OSError) -> ConfigError:
    return ConfigError(f"{key}: can't read {path!r} ({error.strerror}). Use a file that exists")
