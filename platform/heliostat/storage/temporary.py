"""Makes temporary folders for what is large: those of processes that were killed go with the next one that is made.

`tempfile` removes a folder when its process ends by itself; one that is killed leaves it, and with it a model's size of a disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

NEW_S = 60.0  # in which a folder that was just made is locked


@contextmanager
def folder(prefix: str) -> Iterator[Path]:
    """Makes a temporary folder and locks it; removes those of this machine that no process holds: theirs were killed."""
    prefix = f"{prefix}{socket.gethostname()}-"  # locks of folders on a shared file system hold on one machine
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError), _locked(left, fcntl.LOCK_NB) as found:
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > NEW_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix) as name, ExitStack() as held:
        with suppress(OSError):  # of a file system without locks: nobody can lock it there, so nobody removes it
            held.enter_context(_locked(Path(name)))
        yield Path(name)


@contextmanager
def _locked(place: Path, how: int = 0) -> Iterator[os.stat_result]:
    """Locks a folder against other processes, and yields its status; OSError if it is a link or no folder, or, with LOCK_NB, if
    one has it. Without, it waits: whoever looks how old a folder is lets go of a new one at once."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
        yield os.fstat(descriptor)
    finally:
        os.close(descriptor)
