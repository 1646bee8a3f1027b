"""Maps large tables in files of this machine into memory: its processes share one copy, which the kernel may drop and read again.

Tables of fewer than LARGE rows stay in the process's own memory.

The files lie in a folder of this user alone (`heliostat-tables-UID` in the folder for temporary files). A table is made by one
process while the others wait; where no file can be written, each process keeps a table of its own. Files that none has opened
for a day are deleted when the next is written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

log = logging.getLogger(__name__)

LARGE = 1_000_000  # rows
WAIT_S = 600  # for another process that makes the same table
DAY_S = 86_400


def table(key: object, build: Callable[[], pa.Table]) -> pa.Table:
    """Returns the table that `build` makes, which is built once on this machine and shared by its processes through a file.

    `key` is JSON-like and names everything that the table depends on.
    """
    file = _folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.arrow"
    if (found := _open(file)) is not None:
        return found
    try:
        with _alone(file):
            if (found := _open(file)) is not None:
                return found
            built = build()
            _write(file, built)
            return _open(file) or built
    except (OSError, pa.ArrowException) as e:
        log.warning("%s: no table can be shared there (%s); this process keeps its own", file.parent, e)
        return build()


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"heliostat-tables-{os.getuid()}"


def _open(file: Path) -> pa.Table | None:
    """Opens the table in the file; None if there is none, or if another user could have written it."""
    try:
        folder = os.lstat(file.parent)
        if folder.st_uid != os.getuid() or folder.st_mode & 0o077 or not file.is_file():
            return None
        os.utime(file)
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowException):
        return None


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Holds the file's lock, which ends with the process; OSError if it cannot be acquired."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    folder = os.lstat(file.parent)
    if folder.st_uid != os.getuid() or folder.st_mode & 0o077:
        raise PermissionError("the folder is open to other users; remove it")
    with file.with_suffix(".lock").open("w") as lock:
        until = time.monotonic() + WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield


def _write(file: Path, made: pa.Table) -> None:
    """Writes the table whole or not at all, and removes files that have not been used for a day."""
    for other in file.parent.glob("*"):
        if other != file.with_suffix(".lock") and time.time() - other.stat().st_mtime > DAY_S:
            other.unlink(missing_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, made.schema) as writer:
            writer.write_table(made.combine_chunks())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
