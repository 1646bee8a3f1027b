"""Makes temporary folders for what is large: those of processes that were killed go with the next one that is made.

`tempfile` removes a folder when its process ends by itself; one that is killed leaves it, and with it a model's size of a disk.
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

NEW_S = 60.0  # in which a folder that was just made is locked


@contextmanager
def folder(prefix: str) -> Iterator[Path]:
    """Makes a temporary folder and locks it; removes others of this prefix that no process holds, as their own were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError), _locked(left) as found:
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > NEW_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix) as name, _locked(Path(name)):
        yield Path(name)


@contextmanager
def _locked(place: Path) -> Iterator[os.stat_result]:
    """Locks a folder against other processes, and yields its status; OSError if one has it, or it is a link or no folder."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.fstat(descriptor)
    finally:
        os.close(descriptor)
