"""Copies the files and folders that stages and commands use, such as models and word lists, to nodes that don't have them.

The driver describes a path by the name, size, and SHA-256 of each file (`describe`). A task calls `here`. If the path has the
same files on the task's node, the task uses these files. Otherwise the first process of the node that needs the files copies them
from the work folder, which every node reaches, and checks their digests. The copies are in a cache on the node's disk:
`heliostat-shipped-UID` in the folder for temporary files. If a file isn't in the work folder, the task raises `NotHereError`. The
driver then copies the file to the work folder, once and block by block (`offer`). So if all nodes have the files, nothing is
copied. How much disk and memory the driver needs doesn't depend on the number of nodes.

If a folder has safetensors, its pickles and code are neither compared nor copied. Without safetensors, pickles and code are
compared, too. A folder that has pickles or code isn't copied, because loading them on another node can run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.fs as pafs

from heliostat.errors import ConfigError, DataError, HeliostatError
from heliostat.storage import local_files
from heliostat.storage.locations import Location, is_inside
from heliostat.tasks import files

log = logging.getLogger(__name__)

SHIPPED = "shipped"  # the folder of copies in the spill folder, and the kind of the cache
BLOCK = 16 << 20  # bytes that are copied at a time
WAIT_S, BYTES_PER_S = 600.0, 10 << 20  # seconds for a copy to begin, and its minimum speed afterwards
RUNS_CODE = {".bin", ".ckpt", ".h5", ".joblib", ".keras", ".pickle", ".pkl", ".pt", ".pth", ".py", ".pyc", ".so"}
PLAIN = ".safetensors"


@dataclass(frozen=True)
class Item:
    """Describes a file. `name`: the file's path in the shipment's folder, or "" if the shipment is a single file."""

    name: str
    bytes: int
    digest: str

    @property
    def copy(self) -> str:
        """Returns the name of the file's copy in the folder for temporary files."""
        return f"{SHIPPED}/{self.digest}-{self.bytes}"


@dataclass(frozen=True)
class Shipment:
    """Describes the files that a path has on the driver's node. `within`: the parts of the folder to copy; empty for the whole
    folder."""

    path: str
    items: tuple[Item, ...]
    within: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Returns the name of a copied file or folder in the cache: the last part of the path; "" (the cache folder itself) for
        `.` and `..`."""
        name = Path(self.path).name
        return "" if name == ".." else name

    @cached_property
    def digest(self) -> str:
        """Returns the digest of the name and the files. So the same files under another name have another folder in the cache."""
        fields = [self.name, *(astuple(item) for item in self.items)]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


class NotHereError(HeliostatError):
    """Reports that a node lacks a shipment's files, and that the work folder has no copy of these files yet. The driver copies
    the files, and starts the task again."""

    def __init__(self, message: str, shipment: Shipment) -> None:
        super().__init__(message, shipment)
        self.shipment = shipment

    def __str__(self) -> str:
        return self.args[0]


def describe(key: str, path: str, within: tuple[str, ...] = ()) -> Shipment:
    """Describes the files at a key's path on this node. Raises ConfigError with the key if the files can't be read."""
    listed = _listed(Path(path), within)
    items = (Item(name, size, files.digest(key, str(_place(path, name)))) for name, size in listed)
    if not listed:
        files.digest(key, path)  # raises the error
    return Shipment(path, tuple(items), within)


def here(folder: Location, shipment: Shipment) -> str:
    """Returns a path on this node with the shipment's files, and copies the files to the cache if needed. `folder`: the folder
    for temporary files in the work folder.

    Raises NotHereError if the driver must copy the files first. Raises ConfigError if the copy would include code. Raises
    HeliostatError if the copy takes too long or doesn't fit on the disk.
    """
    if _holds(shipment.path, shipment):
        return shipment.path
    cached = local_files.cache(SHIPPED) / shipment.digest
    target = cached / shipment.name
    if _cached(cached, target, shipment):
        return str(target)
    if code := next((item.name for item in shipment.items if item.name and Path(item.name).suffix in RUNS_CODE), None):
        raise ConfigError(
            f"{shipment.path}: on node {socket.gethostname()}, this folder is missing, or differs from the driver's. heliostat "
            f"doesn't copy {code}, because this file can run code. Save the model as safetensors, or put the folder on "
            "every node"
        )
    deadline_s = WAIT_S + shipment.bytes / BYTES_PER_S
    try:
        with local_files.alone(cached, deadline_s):
            if not _cached(cached, target, shipment):
                local_files.remove_unused(cached)
                _fetch(folder, shipment, cached, time.monotonic() + deadline_s)
    except BlockingIOError as e:
        raise HeliostatError(
            f"{cached}: another process has been copying {shipment.path} for {deadline_s:,.0f} s. Run the command again"
        ) from e
    except OSError as e:
        raise HeliostatError(
            f"{cached}: node {socket.gethostname()} can't store a copy of {shipment.path} in this folder ({e.strerror or e}). "
            "Free some space, set TMPDIR to another folder, or put the files on every node"
        ) from e
    return str(target)


def offer(folder: Location, shipment: Shipment) -> None:
    """Copies a shipment's files from the driver's node to the folder for temporary files, except files that are already there.

    Raises ConfigError if a file has changed since `describe`. Also raises ConfigError if a folder in the shipment is a link,
    which `describe` doesn't follow.
    """
    if linked := _linked(Path(shipment.path), shipment.within):
        raise ConfigError(
            f"{linked}: is a link to a folder, which heliostat doesn't copy. Replace the link with the "
            "folder, or put the model on every node"
        )
    for item in shipment.items:
        place, source = folder.join(item.copy), _place(shipment.path, item.name)
        if _size(place) == item.bytes:
            continue
        log.info("%s: copied to the work folder (%s bytes), for nodes that lack this file", source, f"{item.bytes:,}")
        place.upload(source)
        if files.digest("stages", str(source)) != item.digest:
            place.delete()
            raise ConfigError(f"{source}: changed during the run. Don't change this file, and run the command again")


def withdraw(folder: Location) -> None:
    """Deletes the copies of all shipments from the folder for temporary files."""
    folder.join(SHIPPED).delete()


def _place(path: str, name: str) -> Path:
    return Path(path, name) if name else Path(path)


def _listed(root: Path, within: tuple[str, ...]) -> list[tuple[str, int]]:
    """Lists (name, bytes) of a path's files to ship, sorted by name."""
    if root.is_file():
        return [("", root.stat().st_size)]
    paths = [(p.relative_to(root), p) for part in within or ("",) for p in (root / part).rglob("*")]
    sizes = {n.as_posix(): p.stat().st_size for n, p in paths if not _hidden(n) and p.is_file()}
    plain = {n: size for n, size in sizes.items() if Path(n).suffix not in RUNS_CODE}
    return sorted((plain if any(n.endswith(PLAIN) for n in plain) else sizes).items())


def _linked(root: Path, within: tuple[str, ...]) -> Path | None:
    """Returns a symbolic link to a folder among the folders to ship; None if there is no such link."""
    paths = (p for part in within or ("",) for p in (root / part).rglob("*"))
    return next((p for p in paths if p.is_symlink() and p.is_dir() and not _hidden(p.relative_to(root))), None)


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def _holds(path: str, shipment: Shipment) -> bool:
    """Checks whether a path has exactly the shipment's files. Hashes files only if all names and sizes match."""
    try:
        if _listed(Path(path), shipment.within) != [(item.name, item.bytes) for item in shipment.items]:
            return False
        return all(files.digest("stages", str(_place(path, item.name))) == item.digest for item in shipment.items)
    except (OSError, ConfigError):  # files that can't be read on this node
        return False


def _cached(cached: Path, target: Path, shipment: Shipment) -> bool:
    """Checks whether the cache has a complete copy of a shipment. If so, updates the time of the copy's last use."""
    try:
        if not local_files.is_ours(cached.parent) or not _holds(str(target), shipment):
            return False
        os.utime(cached)
    except OSError:  # no cache, or another process just removed it
        return False
    return True


def _fetch(folder: Location, shipment: Shipment, cached: Path, until: float) -> None:
    """Copies a shipment from the folder for temporary files to the cache: all files or none."""
    if missing := [item for item in shipment.items if _size(folder.join(item.copy)) != item.bytes]:
        raise NotHereError(
            (
                f"{_place(shipment.path, missing[0].name)}: this file on node {socket.gethostname()} is missing or "
                f"differs from the driver's, and {folder} has no copy. "
                "The driver copies this file, and runs the task again"
            ),
            shipment,
        )
    for left in cached.parent.glob(f"{cached.name}.*.part"):  # left by a killed process: this one holds the lock
        shutil.rmtree(left, ignore_errors=True)
    if (free := shutil.disk_usage(cached.parent).free) < shipment.bytes:
        raise OSError(f"needs {shipment.bytes:,} bytes, and only {free:,} are free")
    part = cached.with_name(f"{cached.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        for item in shipment.items:
            if item.name and not is_inside(item.name):
                raise DataError(f"{shipment.path}: {item.name!r} is outside this path")
            _write(folder.join(item.copy), _place(str(part / shipment.name), item.name), item, shipment, until)
        if cached.exists():  # its content doesn't match its name
            shutil.rmtree(cached)
        part.rename(cached)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(source: Location, target: Path, item: Item, shipment: Shipment, until: float) -> None:
    """Copies a file from the folder for temporary files to the disk. If the digest is wrong, deletes the temporary file and
    raises NotHereError, so that the driver copies the file again."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    hasher = hashlib.sha256()
    with target.open("wb") as out:
        for block in _blocks(source, item.bytes):
            if time.monotonic() > until:
                raise HeliostatError(
                    f"{source}: reading is too slow: {shipment.bytes:,} bytes didn't arrive in time. Run the command again"
                )
            hasher.update(block)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    if hasher.hexdigest() != item.digest:
        source.delete()
        raise NotHereError(f"{source}: was damaged, so heliostat removed this copy", shipment)


def _blocks(source: Location, size: int) -> Iterator[bytes]:
    with source.open() as file:
        for begin in range(0, size, BLOCK):
            yield source.attempt(lambda begin=begin: file.read_at(min(BLOCK, size - begin), begin))  # type: ignore[misc]


def _size(place: Location) -> int | None:
    info = place.attempt(lambda: place.fs.get_file_info(place.path))
    return info.size if info.type == pafs.FileType.File else None
