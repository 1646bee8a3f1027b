"""Manages the versions of a prepared dataset, which share its folder, and removes replaced versions after a time.

A shard's name has its number and the digest of its bytes: `shards/00017/3f2a....parquet`. Other files of a version are named
after their content, too: `files/tokenizer-9c01....json`. So a new version never overwrites an old one, versions share equal
files, and equal input gives equal names. Guarantees:

- heliostat removes only two kinds of files: files that a replaced version's manifest lists, and files that no version lists, with
  names of these two forms. A killed `prepare` leaves files of the second kind. heliostat removes these when they are a day old,
  because another `prepare` may still be writing younger files.
- A replaced version stays for `keep_s` seconds, for the runs that read it. A later `prepare` removes it.
- `prepared.json` is the folder's record. A folder that has other files, but neither record nor manifest, isn't a dataset of
  heliostat.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs

from heliostat.data import device_threads, manifest
from heliostat.data.manifest import FILES, SHARDS, Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)

RECORD = "prepared.json"
REMOVERS = 32  # threads
ORPHAN_S = 86_400  # seconds: a file that no version lists and that is older is from a killed `prepare`
OURS = re.compile(rf"(?:[^/]+/)?(?:{SHARDS}/\d+|{FILES})/(?:[a-z_]+-)?[0-9a-f]{{16}}\.[a-z]+(?:\.[0-9a-f]{{8}}\.partial)?")


@dataclass(frozen=True)
class Pruned:
    """Reports the removed files and bytes.

    `kept`: replaced versions that remain; `until`: when the last remaining version expires (seconds since 1970); None if no
    version remains.
    """

    files: int
    bytes: int
    kept: int
    until: float | None


NOTHING = Pruned(0, 0, 0, None)


def store(location: Location, prefix: str, data: bytes, suffix: str) -> str:
    """Writes a file that is named after its content, and returns its path in the dataset: `PREFIX3f2a....SUFFIX`."""
    path = f"{prefix}{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    location.join(path).write(data)
    return path


# the record ----------------------------------------------------------------------------------------------------------


def read_record(location: Location) -> dict[str, Any]:
    """Reads the folder's record; {} if the record is missing or damaged.

    Raises ConfigError if the folder has files, but neither a record nor a readable manifest.
    """
    with suppress(FileNotFoundError):
        raw = location.join(RECORD).read()
        with suppress(ValueError):
            if isinstance(record := json.loads(raw), dict):
                return record | {"replaced": _times(record.get("replaced"))}
        log.warning("%s: the file is damaged, so heliostat writes a new one", location.join(RECORD))
        return {}
    files = location.attempt(lambda: location.fs.get_file_info(pafs.FileSelector(location.path, allow_not_found=True)))
    if not files:
        return {}
    try:
        manifest.read(location)
    except DataError as e:
        first = min(i.base_name for i in files)
        raise ConfigError(
            f"output: {location}: not empty, and not a heliostat dataset (it contains {first!r}, but "
            f"not {RECORD}). Use another folder, or delete the files in this folder"
        ) from e
    return {}


def _times(raw: object) -> dict[str, float]:
    """Extracts the times at which versions were replaced. Invalid entries of the record are left out."""
    return {name: float(t) for name, t in raw.items() if isinstance(t, int | float)} if isinstance(raw, dict) else {}


def write_record(location: Location, record: Mapping[str, object]) -> None:
    location.join(RECORD).write(json.dumps(record, indent=1).encode())


def claim(location: Location, record: Mapping[str, Any]) -> dict[str, Any]:
    """Writes into the record that this process prepares the dataset. Returns the record.

    Raises ConfigError if another process of this machine is preparing the dataset.
    """
    if isinstance(other := record.get("building"), dict):
        host, pid = other.get("host"), other.get("pid")
        if host != socket.gethostname():
            log.warning("%s: `data prepare` on %r didn't finish, or is still running. "
                        "If it is still running, stop one of the two: concurrent prepares damage each other's files",
                        location, host)  # fmt: skip
        elif pid != os.getpid() and _alive(pid, other.get("started")):
            raise ConfigError(
                f"output: {location}: process {pid} is preparing this dataset. Wait until that process ends, or stop it first"
            )
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    record = {**record, "building": mine}
    write_record(location, record)
    return record


def release(location: Location, record: Mapping[str, object]) -> None:
    """Writes the folder's record without the entry that `claim` added for this process."""
    write_record(location, {k: v for k, v in record.items() if k != "building"})


def _alive(pid: object, started: object) -> bool:
    try:
        known = isinstance(pid, int) and isinstance(started, float)
        return known and abs(psutil.Process(pid).create_time() - started) < 1
    except (psutil.Error, ValueError):
        return False


# files in the folder -------------------------------------------------------------------------------------------------


def listing(location: Location) -> dict[str, pafs.FileInfo]:
    """Lists the files in the dataset's folder whose names have the forms that `prepare` uses, by relative path."""
    selector = pafs.FileSelector(location.path, recursive=True, allow_not_found=True)
    files = location.attempt(lambda: location.fs.get_file_info(selector))
    paths = ((i.path[len(location.path) + 1 :], i) for i in files if i.type == pafs.FileType.File)
    return {path: info for path, info in paths if OURS.fullmatch(path)}


def all_versions(location: Location, known: Manifest | None = None) -> Iterator[tuple[str, Manifest]]:
    """Yields the name of each kept version's file, and the version. Reads one version at a time, because a manifest may be large;
    doesn't read the version that the caller already has (`known`). Raises DataError if a version can't be read."""
    own = manifest.version_name(known.digest) if known else ""
    for name, _ in location.join(manifest.VERSIONS).files():
        yield name, known if known and name == own else manifest.read_version(location, name)


def paths(version: Manifest) -> set[str]:
    """Lists every file of a version, relative to the dataset's folder; for a collection, also its parts' manifests."""
    parts, digests, beside = (version.meta.get(key, {}) for key in ("parts", "digests", "files"))
    folders = ["", *(f"{part}/" for part in parts)]
    named = {f"{folder}{path}" for folder in folders for name in beside for path in (name, beside[name])}
    named |= {manifest.kept_path(version.digest, name) for name in manifest.BESIDE if not beside}
    named |= {f"{part}/{manifest.FILE}" for part in parts}
    named |= {f"{part}/{manifest.VERSIONS}/{manifest.version_name(digest)}" for part, digest in digests.items()}
    named |= {manifest.kept_path(version.digest, name) for name in manifest.UNCOVERED if version.meta.get("also")}
    return named | set(version.paths) | set(version.meta.get("also", []))


# publishing and removing ---------------------------------------------------------------------------------------------


def mark(location: Location, newest: Manifest | None, record: Mapping[str, Any], now: float | None = None) -> dict[str, Any]:
    """Marks every kept version except `newest` as replaced, and returns the record.

    Versions that are already marked keep the time of their mark.
    """
    now = time.time() if now is None else now
    known = record.get("replaced", {})
    own = manifest.version_name(newest.digest) if newest else ""
    names = [name for name, _ in location.join(manifest.VERSIONS).files() if name != own]
    return {**record, "replaced": {name: known.get(name, now) for name in names}}


def prune(newest: Manifest, record: Mapping[str, Any], keep_s: float) -> Pruned:
    """Removes the versions that were replaced at least `keep_s` seconds ago, and old files that no version lists.

    If a version can't be read, removes no file.
    """
    location, now = newest.location, time.time()
    try:
        listed = {name: paths(version) for name, version in all_versions(location, newest)}
    except DataError as e:
        log.warning("%s. heliostat can't read this version, so it doesn't remove files of earlier versions", e)
        return NOTHING
    ages = {name: now - when for name, when in record.get("replaced", {}).items() if name in listed}
    gone = {name for name, age in ages.items() if age >= keep_s and name != manifest.version_name(newest.digest)}
    needed = set[str]().union(paths(newest), *(names for version, names in listed.items() if version not in gone))
    wanted = set[str]().union(*(listed[version] for version in gone)) - needed
    ours = listing(location)
    orphans = {p for p, i in ours.items() if p not in needed and now - (i.mtime_ns or 0) / 1e9 >= ORPHAN_S} - wanted
    doomed = sorted(wanted | orphans)
    if doomed:
        log.info("%s: removing %d files of %d replaced versions and of interrupted runs", location, len(doomed), len(gone))
    removed = remove_all(location, doomed)
    for name in sorted(gone):  # last, so that an interrupted removal is repeated
        remove(location, f"{manifest.VERSIONS}/{name}")
    left = [now - age + keep_s for name, age in ages.items() if name not in gone]
    return Pruned(len(doomed), removed, len(left), max(left, default=None))


def remove_all(location: Location, paths: list[str]) -> int:
    """Deletes files, several in parallel because object storage answers slowly; returns the sum of their sizes in bytes."""
    with device_threads.pool(REMOVERS) as pool:
        return sum(pool.map(partial(remove, location), paths))


def remove(location: Location, path: str) -> int:
    """Deletes a file, and its parent folders if they are then empty; returns the file's size in bytes."""
    place = location.join(path)
    info = place.attempt(lambda: place.fs.get_file_info(place.path))
    if info.type == pafs.FileType.File:
        place.attempt(lambda: place.fs.delete_file(place.path))
    for folder in Path(path).parents if not location.is_s3 else ():
        if str(folder) != ".":
            try:
                Path(location.path, folder).rmdir()
            except OSError:
                break
    return info.size or 0


def publish(location: Location, dataset: Manifest) -> None:
    """Copies a version's files other than shards to their plain names (`tokenizer.json`), for people and other tools."""
    for folder in [location, *(location.join(part) for part in dataset.meta.get("parts", {}))]:
        for name, path in dataset.meta.get("files", {}).items():
            folder.join(name).write(folder.join(path).read())


def save_beside(location: Location) -> None:
    """Copies files with plain names, such as `tokenizer.json`, before a new version overwrites them.

    Only versions without `files` in their metadata need these copies. Other versions already have their own files.
    """
    try:
        newest = manifest.read(location)
    except DataError:
        return
    for part in newest.meta.get("parts", {}):
        save_beside(location.join(part))
    for name in manifest.BESIDE if "files" not in newest.meta else ():
        if location.join(name).exists():
            location.join(manifest.kept_path(newest.digest, name)).write(location.join(name).read())
