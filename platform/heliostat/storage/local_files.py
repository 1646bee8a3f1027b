"""Makes temporary folders, shares a cache between the processes of a machine, and creates files without overwriting others.

`tempfile` removes a temporary folder only if its process ends normally. So `temporary_folder` also removes the folders of killed
processes. A cache is in a folder of this user only. One process makes an entry while the other processes wait for the entry's
lock. An entry that no process used for a day is deleted.
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
SQLITE = b"SQLite format 3\0"  # first bytes of every SQLite database
LOCK = ".lock"
NEW_S = 60.0  # seconds: a younger folder may not be locked yet


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Makes a temporary folder and locks it.

    First removes this machine's temporary folders that no process has locked, because the processes that made them were killed.
    """
    prefix = f"{prefix}{socket.gethostname()}-"  # the lock of a folder on a shared file system is valid on one machine only
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError), _locked(left, fcntl.LOCK_NB) as status:
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > NEW_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix) as name, ExitStack() as stack:
        with suppress(OSError):  # a file system without locks: no process can lock the folder, so none removes it
            stack.enter_context(_locked(Path(name)))
        yield Path(name)


@contextmanager
def _locked(place: Path, how: int = 0) -> Iterator[os.stat_result]:
    """Locks a folder against other processes, and yields its status.

    Raises OSError if the path is a link or isn't a folder. If another process has the lock, waits; with LOCK_NB, raises OSError
    instead. The wait is short if the other process only checks whether the folder is in use.
    """
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
        yield os.fstat(descriptor)
    finally:
        os.close(descriptor)


def cache(kind: str) -> Path:
    """Returns the folder for one kind of shared files. The folder may not exist yet."""
    return Path(tempfile.gettempdir()) / f"heliostat-{kind}-{os.getuid()}"


def is_ours(place: Path) -> bool:
    """Returns whether only this user has access to a folder. Raises OSError if the folder is missing."""
    status = os.lstat(place)
    return status.st_uid == os.getuid() and not status.st_mode & 0o077


@contextmanager
def alone(file: Path, wait_s: float) -> Iterator[None]:
    """Holds the lock of a file or folder in a cache within the context. The operating system releases the lock if the process
    dies.

    Raises OSError if the lock can't be acquired within `wait_s` seconds, or if other users have access to the cache.
    """
    file.parent.mkdir(mode=0o700, exist_ok=True)
    if not is_ours(file.parent):
        raise PermissionError(f"{file.parent}: other users can write to this folder. Delete this folder")
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
    """Removes the entries that were not used for a day from the cache of `file`, whose lock this process holds. Keeps entries
    whose lock another process holds, because that process may still fill them."""
    for other in sorted(file.parent.glob("*"), key=lambda place: place.suffix == LOCK):  # locks after their entries
        with suppress(OSError):  # another process may remove it, too
            if other == file.with_suffix(LOCK) or not _is_unused(other):
                continue
            with other.with_suffix(LOCK).open("a") as lock:  # doesn't change the time, as "w" does
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_unused(other):
                    shutil.rmtree(other) if other.is_dir() else other.unlink()


def _is_unused(entry: Path) -> bool:
    return time.time() - entry.stat().st_mtime > DAY_S


def put_new(path: str, data: bytes) -> bool:
    """Creates a file. If the file exists, changes nothing and returns False.

    The file appears complete, because it is a hard link to a complete file. On a file system without links, writes the file
    directly, so a reader may see a part of the file.
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
    """Returns whether files can be created in a folder. In folders of the kernel, such as /proc, no user can create files."""
    if os.statvfs(folder).f_blocks:
        return True
    try:
        Path(tempfile.mkdtemp(dir=folder)).rmdir()
    except OSError:
        return False
    return True


def require_database(key: str, place: Path) -> None:
    """Raises ConfigError, which names the key, if the file exists but isn't an SQLite database. An empty file is valid."""
    try:
        with place.open("rb") as file:
            begin = file.read(len(SQLITE))
    except FileNotFoundError:
        return
    except OSError as e:
        raise ConfigError(f"{key}: can't read {place} ({e.strerror}). Use the file of an SQLite database") from e
    if begin and begin != SQLITE:
        raise ConfigError(f"{key}: {place} isn't an SQLite database. Use another file")
