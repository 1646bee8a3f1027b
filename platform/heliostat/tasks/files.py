"""Reads the files that stages' keys name: lists of words and domains, evaluation sets; and their digests.

The driver spills the files that `digests` is asked for, and a task reads the spills, wherever it runs. So a stage that uses
`digests` reads its files by `read` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from heliostat.errors import ConfigError
from heliostat.storage.locations import Location

_noted: ContextVar[dict[str, bytes] | None] = ContextVar("noted", default=None)
_spilled: ContextVar[Callable[[str], bytes | None]] = ContextVar("spilled", default=lambda path: None)


@contextmanager
def noted() -> Iterator[dict[str, bytes]]:
    """Collects the files that `digests` reads meanwhile, by their paths."""
    found = dict[str, bytes]()
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


@contextmanager
def spilled(folder: Location, names: dict[str, str]) -> Iterator[None]:
    """Lets files be read from the spills that they have by their paths."""
    token = _spilled.set(lambda path: folder.join(names[path]).read() if path in names else None)
    try:
        yield
    finally:
        _spilled.reset(token)


def read(key: str, path: str) -> bytes:
    """Reads a file that a key names; ConfigError that names the key if it cannot be."""
    if (held := _spilled.get()(path)) is not None:
        return held
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"{key}: {path!r} cannot be read ({e.strerror}); name a file that is there") from e


def entries(key: str, path: str) -> list[str]:
    """Reads a list, one entry a line; empty lines and those that begin with # are comments."""
    try:
        lines = read(key, path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{key}: {path!r} is not UTF-8 (byte {e.start:,}); convert it") from e
    found = [entry for line in lines if (entry := line.strip()) and not entry.startswith("#")]
    if not found:
        raise ConfigError(f"{key}: {path!r} has no entry in it; give one a line")
    return found


def digest(key: str, path: str) -> str:
    """Returns the SHA-256 of a file that a key names."""
    return hashlib.sha256(read(key, path)).hexdigest()


def digests(identity: dict[str, Any], stage: Any, *keys: str) -> dict[str, Any]:
    """Puts digests in place of the paths that the keys hold: one, a list of them, or a mapping of names to them."""
    out = dict(identity)
    for key in keys:
        value = getattr(stage, key)
        if isinstance(value, str):
            out[key] = _noting(key, value)
        elif isinstance(value, dict):
            out[key] = {name: _noting(key, path) for name, path in value.items()}
        elif value:
            out[key] = [_noting(key, path) for path in value]
    return out


def _noting(key: str, path: str) -> str:
    data = read(key, path)
    if (found := _noted.get()) is not None:
        found[path] = data
    return hashlib.sha256(data).hexdigest()
