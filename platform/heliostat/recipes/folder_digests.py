"""Computes digests of model folders. A digest identifies a model at any path.

The processes of a machine share the digests of large files, such as weights, through a cache (`storage.local_files`): one process
reads the file, and the others wait for its digest. A digest belongs to the file's size and times of change, to the nanosecond.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from heliostat.storage import local_files
from heliostat.storage.hub import files

LARGE = 64 << 20  # bytes: smaller files are read faster than the cache is locked
WAIT_S = 600  # seconds to wait for another process that reads the same file
SETTLED_NS = 2_000_000_000  # a file that changed later may change again with the same times
DIGITS = 64  # of a SHA-256
FileState = tuple[int, int, int, int, int]  # device, inode, bytes, and times of change in ns: of the content, and of the inode

log = logging.getLogger(__name__)


def folder_digest(folder: str) -> str:
    """Computes a digest of a model folder's configuration and weights, which identifies the model at any path."""
    listed = {p.name: sha256(p) for p in Path(folder).iterdir() if p.suffix in (".json", ".safetensors")}
    return digest_of({**files.absent_weights(Path(folder)), **listed})


def weights_digest(folder: Path) -> str:
    """Computes a digest of a folder's weights and `config.json`. Other files, such as a tokenizer, don't change this digest."""
    listed = {path.name: sha256(path) for path in _weights(folder)}
    return digest_of({**files.absent_weights(folder), **listed})


def matches(folder: Path, digest: str, recorded: str | None) -> bool:
    """Checks whether a recorded digest is that of a folder's weights, `digest`. Earlier versions left pickled weights out, so
    their digest of such a folder is accepted too."""
    if recorded == digest:
        return True
    kept = [path for path in _weights(folder) if path.suffix != ".bin"]
    return recorded == digest_of({**files.absent_weights(folder), **{path.name: sha256(path) for path in kept}})


def weights_state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Lists the files of `weights_digest` with their sizes in bytes and times of change in ns. Reads no content."""
    stats = sorted((path.name, path.stat()) for path in _weights(folder))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _weights(folder: Path) -> list[Path]:
    """Lists `config.json`, and the files from which transformers loads weights: safetensors, or pickles if there are no
    safetensors."""
    listed = sorted(folder.iterdir())
    weights = [p for p in listed if p.suffix == ".safetensors"] or [p for p in listed if p.match("pytorch_model*.bin")]
    return [*(p for p in listed if p.name == "config.json"), *weights]


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file. A second call for an unchanged file reads no content. If the file is large, this is also
    true for a call in another process of this machine."""
    return _sha256(path, _state(path))


def _state(path: Path) -> FileState:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=4096)
def _sha256(path: Path, state: FileState) -> str:
    if state[2] < LARGE:
        return _content(path)
    key = json.dumps([str(path.resolve()), *state])
    file = local_files.cache("digests") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.txt"
    try:
        with local_files.alone(file, WAIT_S):
            return _shared(file, path, state)
    except OSError as e:
        log.warning("%s: can't share the digest of %s in this folder (%s)", file.parent, path.name, e)
        return _content(path)


def _shared(file: Path, path: Path, state: FileState) -> str:
    """Returns the digest in the cache's `file`, whose lock this process holds. If there is none, computes the digest, and writes
    it unless the file at `path` may still change without a change of its times."""
    with suppress(OSError):
        os.utime(file)
        if len(cached := file.read_text()) == DIGITS:
            return cached
    begun_ns = time.time_ns()
    digest = _content(path)
    if _state(path) == state and begun_ns - state[4] > SETTLED_NS:
        local_files.remove_unused(file)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(digest)
        part.replace(file)
    return digest


def _content(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of(listed: Mapping[str, str]) -> str:
    """Computes the digest of files from their names and SHA-256 digests."""
    digest = hashlib.sha256()
    for name, content in sorted(listed.items()):
        digest.update(name.encode())
        digest.update(bytes.fromhex(content))
    return digest.hexdigest()[:32]
