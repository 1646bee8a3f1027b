"""Keeps files that the processes of a machine share: folders of this user alone, in the folder for temporary files.

What a cache holds is made by one process while the others wait for its lock, and is deleted after a day in which none used it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAY_S = 86_400
LOCK = ".lock"


def folder(kind: str) -> Path:
    """Returns the folder of a kind of files, which may not be there."""
    return Path(tempfile.gettempdir()) / f"heliostat-{kind}-{os.getuid()}"


def is_ours(place: Path) -> bool:
    """Tells whether no other user can have written into a folder; OSError if it is not there."""
    found = os.lstat(place)
    return found.st_uid == os.getuid() and not found.st_mode & 0o077


@contextmanager
def alone(file: Path, wait_s: float) -> Iterator[None]:
    """Holds the lock of a file or folder of a cache, which ends with the process; OSError if it cannot be acquired."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    if not is_ours(file.parent):
        raise PermissionError(f"{file.parent}: the folder is open to other users; remove it")
    with file.with_suffix(LOCK).open("w") as lock:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield


def remove_unused(file: Path) -> None:
    """Removes what has not been used for a day from the cache that a file is in, whose lock this process holds."""
    for other in file.parent.glob("*"):
        with suppress(OSError):  # of another process that removes it too
            if other != file.with_suffix(LOCK) and time.time() - other.stat().st_mtime > DAY_S:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
