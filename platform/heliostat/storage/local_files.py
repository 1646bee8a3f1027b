"""Makes temporary folders, shares a cache between the processes of a machine, and puts a file only where none is.

A temporary folder whose process was killed goes with the next one that is made: `tempfile` removes a folder only when its process
ends by itself. What a cache holds is made by one process while the others wait for its lock, in a folder of this user alone, and
is deleted after a day in which no process used it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from heliostat.errors import ConfigError

DAY_S = 86_400
SQLITE = b"SQLite format 3\0"  # which every file of a database begins with
LOCK = ".lock"
NEW_S = 60.0  # in which a folder that was just made is locked


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Makes a temporary folder and locks it; removes those of this machine that no process holds: theirs were killed."""
    prefix = f"{prefix}{socket.gethostname()}-"  # locks of folders on a shared file system hold on one machine
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError), _locked(left, fcntl.LOCK_NB) as status:
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > NEW_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix) as name, ExitStack() as stack:
        with suppress(OSError):  # of a file system without locks: no process can lock it there, so none removes it
            stack.enter_context(_locked(Path(name)))
        yield Path(name)


@contextmanager
def _locked(place: Path, how: int = 0) -> Iterator[os.stat_result]:
    """Locks a folder against other processes, and yields its status; OSError if it is a link or no folder, or, with LOCK_NB, if
    one has it. Without, it waits: a process that looks how old a folder is lets go of a new one at once."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
        yield os.fstat(descriptor)
    finally:
        os.close(descriptor)


def cache(kind: str) -> Path:
    """Returns the folder of a kind of files that processes share, which may not be there."""
    return Path(tempfile.gettempdir()) / f"heliostat-{kind}-{os.getuid()}"


def is_ours(place: Path) -> bool:
    """Tells whether no other user can have written into a folder; OSError if it is not there."""
    status = os.lstat(place)
    return status.st_uid == os.getuid() and not status.st_mode & 0o077


@contextmanager
def alone(file: Path, wait_s: float) -> Iterator[None]:
    """Holds the lock of a file or folder of a cache, which ends with the process; OSError if it cannot be acquired."""
    file.parent.mkdir(mode=0o700, exist_ok=True)
    if not is_ours(file.parent):
        raise PermissionError(f"{file.parent}: other users can write to this folder. Remove it")
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


def put_new(path: str, data: bytes) -> bool:
    """Writes a file if there is none of this name; returns False, and changes nothing, if there is one.

    It is a hard link to a complete file, so that it appears whole; where a file system has no links, it is opened as a new one.
    """
    target, partial = Path(path), Path(f"{path}.{uuid.uuid4().hex[:8]}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(data)
        try:
            os.link(partial, target)
        except FileExistsError:
            raise
        except OSError:
            with target.open("xb") as file:
                file.write(data)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def takes_files(folder: Path) -> bool:
    """Tells whether files can be made in a folder: not in one that shows what the kernel knows, such as /proc, by any user."""
    if os.statvfs(folder).f_blocks:
        return True
    try:
        Path(tempfile.mkdtemp(dir=folder)).rmdir()
    except OSError:
        return False
    return True


def require_database(key: str, place: Path) -> None:
    """Raises ConfigError that names the key if a path holds something else than an SQLite database, which may still be empty."""
    try:
        with place.open("rb") as file:
            begin = file.read(len(SQLITE))
    except FileNotFoundError:
        return
    except OSError as e:
        raise ConfigError(f"{key}: can't read {place} ({e.strerror}). Name the file of an SQLite database") from e
    if begin and begin != SQLITE:
        raise ConfigError(f"{key}: {place} isn't an SQLite database. Name another file")
