"""Ships the files and folders that stages and commands name, such as models and word lists, to nodes that lack them.

The driver describes a path by the name, size, and SHA-256 of each file (`describe`). A task calls `here`: where the path holds
these files on its node, it is used as it is. Otherwise the first process of the node copies them from the work folder, which
every node reaches, to a cache on its disk (`heliostat-shipped-UID` in the folder for temporary files), and checks the digests.
The driver copies to the work folder what a task has asked for (`NotHereError`), once and block by block (`offer`). So a cluster
whose nodes hold the files copies nothing, and one that grows needs nothing of the driver's disk or memory for each node.

Pickles and code in a folder are neither compared nor copied, if the folder has safetensors. One without is compared with them,
and isn't copied: heliostat doesn't hand a node what runs code when it is loaded.
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

SHIPPED = "shipped"  # the folder of copies among the spills, and the kind of the cache
BLOCK = 16 << 20  # bytes that are copied at a time
WAIT_S, BYTES_PER_S = 600.0, 10 << 20  # for a copy to begin, and the slowest that it may then be
RUNS_CODE = {".bin", ".ckpt", ".h5", ".joblib", ".keras", ".pickle", ".pkl", ".pt", ".pth", ".py", ".pyc", ".so"}
PLAIN = ".safetensors"


@dataclass(frozen=True)
class Item:
    """Describes a file by its path below the shipment's, "" if that is the file itself."""

    name: str
    bytes: int
    digest: str

    @property
    def copy(self) -> str:
        """Returns the name of its copy among the spills."""
        return f"{SHIPPED}/{self.digest}-{self.bytes}"


@dataclass(frozen=True)
class Shipment:
    """Describes what a path holds on the driver's node; of a folder `within` these parts, if any are given."""

    path: str
    items: tuple[Item, ...]
    within: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Returns the name of a copy in its folder of the cache: the path's, and "" (that folder itself) of `.` and `..`."""
        name = Path(self.path).name
        return "" if name == ".." else name

    @cached_property
    def digest(self) -> str:
        """Returns the digest of the name and the files: files of another name have a folder of their own in the cache."""
        fields = [self.name, *(astuple(item) for item in self.items)]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


class NotHereError(HeliostatError):
    """Reports that a node lacks files of which the work folder has no copy yet: the driver copies them, and starts the task
    again."""

    def __init__(self, message: str, shipment: Shipment) -> None:
        super().__init__(message, shipment)
        self.shipment = shipment

    def __str__(self) -> str:
        return self.args[0]


def describe(key: str, path: str, within: tuple[str, ...] = ()) -> Shipment:
    """Describes what the path of a key holds here; ConfigError that names the key if that cannot be read."""
    listed = _listed(Path(path), within)
    items = (Item(name, size, files.digest(key, str(_place(path, name)))) for name, size in listed)
    if not listed:
        files.digest(key, path)  # which raises the error
    return Shipment(path, tuple(items), within)


def here(folder: Location, shipment: Shipment) -> str:
    """Returns a path on this node that holds what a shipment describes; `folder`: that of the spills.

    NotHereError if the driver must copy it first, HeliostatError if it does not come in time.
    """
    if _holds(shipment.path, shipment):
        return shipment.path
    cached = local_files.cache(SHIPPED) / shipment.digest
    target = cached / shipment.name
    if _cached(cached, target, shipment):
        return str(target)
    if code := next((item.name for item in shipment.items if item.name and Path(item.name).suffix in RUNS_CODE), None):
        raise ConfigError(
            f"{shipment.path}: node {socket.gethostname()} has no such folder, or a different one. heliostat "
            f"doesn't copy {code}, because it can run code. Save the model as safetensors, or put the folder on "
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
            f"{cached}: another process has been copying {shipment.path} for {deadline_s:,.0f} s. Start again"
        ) from e
    except OSError as e:
        raise HeliostatError(
            f"{cached}: node {socket.gethostname()} can't keep a copy of {shipment.path} there ({e.strerror or e}). "
            "Free some space there, set TMPDIR to another folder, or put the files on every node"
        ) from e
    return str(target)


def offer(folder: Location, shipment: Shipment) -> None:
    """Copies files of the driver's node to the folder of the spills, as far as they are not there; ConfigError if they have
    changed since they were described, or a folder in theirs is a link: what it leads to isn't described."""
    if linked := _linked(Path(shipment.path), shipment.within):
        raise ConfigError(
            f"{linked}: is a link to a folder, which heliostat doesn't copy. Put the folder there, or the model on every node"
        )
    for item in shipment.items:
        place, source = folder.join(item.copy), _place(shipment.path, item.name)
        if _size(place) == item.bytes:
            continue
        log.info("%s: copied to the work folder (%s bytes), for nodes that lack it", source, f"{item.bytes:,}")
        place.upload(source)
        if files.digest("stages", str(source)) != item.digest:
            place.delete()
            raise ConfigError(f"{source}: changed during the run. Don't change it, and start again")


def withdraw(folder: Location) -> None:
    """Deletes all copies from the folder of the spills."""
    folder.join(SHIPPED).delete()


def _place(path: str, name: str) -> Path:
    return Path(path, name) if name else Path(path)


def _listed(root: Path, within: tuple[str, ...]) -> list[tuple[str, int]]:
    """Lists (name, bytes) of the files that a path holds and that are shipped, sorted."""
    if root.is_file():
        return [("", root.stat().st_size)]
    paths = [(p.relative_to(root), p) for part in within or ("",) for p in (root / part).rglob("*")]
    sizes = {n.as_posix(): p.stat().st_size for n, p in paths if not _hidden(n) and p.is_file()}
    plain = {n: size for n, size in sizes.items() if Path(n).suffix not in RUNS_CODE}
    return sorted((plain if any(n.endswith(PLAIN) for n in plain) else sizes).items())


def _linked(root: Path, within: tuple[str, ...]) -> Path | None:
    """Returns a link to a folder, below those that are shipped, if there is one."""
    paths = (p for part in within or ("",) for p in (root / part).rglob("*"))
    return next((p for p in paths if p.is_symlink() and p.is_dir() and not _hidden(p.relative_to(root))), None)


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def _holds(path: str, shipment: Shipment) -> bool:
    """Tells whether a path holds exactly what a shipment describes; files are hashed only where names and sizes are right."""
    try:
        if _listed(Path(path), shipment.within) != [(item.name, item.bytes) for item in shipment.items]:
            return False
        return all(files.digest("stages", str(_place(path, item.name))) == item.digest for item in shipment.items)
    except (OSError, ConfigError):  # that cannot be read here
        return False


def _cached(cached: Path, target: Path, shipment: Shipment) -> bool:
    """Tells whether the cache holds a shipment, and notes that it is used."""
    try:
        if not local_files.is_ours(cached.parent) or not _holds(str(target), shipment):
            return False
        os.utime(cached)
    except OSError:  # of no cache, or one that is just removed
        return False
    return True


def _fetch(folder: Location, shipment: Shipment, cached: Path, until: float) -> None:
    """Copies a shipment from the folder of the spills to the cache, whole or not at all."""
    if missing := [item for item in shipment.items if _size(folder.join(item.copy)) != item.bytes]:
        raise NotHereError(
            (
                f"{_place(shipment.path, missing[0].name)}: this file on node {socket.gethostname()} is missing or "
                f"differs from the driver's, and {folder} has no copy"
            ),
            shipment,
        )
    for left in cached.parent.glob(f"{cached.name}.*.part"):  # by a process that was killed, as this one holds the lock
        shutil.rmtree(left, ignore_errors=True)
    if (free := shutil.disk_usage(cached.parent).free) < shipment.bytes:
        raise OSError(f"needs {shipment.bytes:,} bytes, and only {free:,} are free")
    part = cached.with_name(f"{cached.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        for item in shipment.items:
            if item.name and not is_inside(item.name):
                raise DataError(f"{shipment.path}: {item.name!r} is outside it")
            _write(folder.join(item.copy), _place(str(part / shipment.name), item.name), item, shipment, until)
        if cached.exists():  # and is not what its name says
            shutil.rmtree(cached)
        part.rename(cached)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(source: Location, target: Path, item: Item, shipment: Shipment, until: float) -> None:
    """Copies a file to the disk; a copy whose digest is wrong is removed, and asked for again."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    hasher = hashlib.sha256()
    with target.open("wb") as out:
        for block in _blocks(source, item.bytes):
            if time.monotonic() > until:
                raise HeliostatError(
                    f"{source}: reading is too slow: {shipment.bytes:,} bytes didn't arrive in time. Start again"
                )
            hasher.update(block)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    if hasher.hexdigest() != item.digest:
        source.delete()
        raise NotHereError(f"{source}: was damaged, so heliostat removed it", shipment)


def _blocks(source: Location, size: int) -> Iterator[bytes]:
    with source.open() as file:
        for begin in range(0, size, BLOCK):
            yield source.attempt(lambda begin=begin: file.read_at(min(BLOCK, size - begin), begin))  # type: ignore[misc]


def _size(place: Location) -> int | None:
    info = place.attempt(lambda: place.fs.get_file_info(place.path))
    return info.size if info.type == pafs.FileType.File else None
