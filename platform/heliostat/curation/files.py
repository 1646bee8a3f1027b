"""Reads the files that stages' keys name: lists of words and domains, evaluation sets; and their digests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from heliostat.errors import ConfigError


def read(key: str, path: str) -> bytes:
    """Reads a file that a key names; ConfigError that names the key if it cannot be."""
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
            out[key] = digest(key, value)
        elif isinstance(value, dict):
            out[key] = {name: digest(key, path) for name, path in value.items()}
        elif value:
            out[key] = [digest(key, path) for path in value]
    return out
