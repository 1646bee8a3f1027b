"""Computes digests of model folders. A digest identifies a model at any path."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from heliostat.storage.hub import files


def folder_digest(folder: str) -> str:
    """Computes a digest of a model folder's configuration and weights, which identifies the model at any path."""
    listed = {p.name: sha256(p) for p in Path(folder).iterdir() if p.suffix in (".json", ".safetensors")}
    return digest_of({**files.absent_weights(Path(folder)), **listed})


def weights_digest(folder: Path) -> str:
    """Computes a digest of a folder's weights and `config.json`. Other files, such as a tokenizer, don't change this digest."""
    listed = {path.name: sha256(path) for path in _weights(folder)}
    return digest_of({**files.absent_weights(folder), **listed})


def weights_state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Lists the files of `weights_digest` with their sizes in bytes and times of change in ns. Reads no content."""
    stats = sorted((path.name, path.stat()) for path in _weights(folder))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _weights(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"]


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file. A second call for an unchanged file reads no content."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of(listed: Mapping[str, str]) -> str:
    """Computes the digest of files from their names and SHA-256 digests."""
    digest = hashlib.sha256()
    for name, content in sorted(listed.items()):
        digest.update(name.encode())
        digest.update(bytes.fromhex(content))
    return digest.hexdigest()[:32]
