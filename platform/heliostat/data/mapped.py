"""Maps large tables in files of this machine into memory: its processes share one copy, which the kernel may drop and read again.

Tables of fewer than LARGE rows stay in the process's own memory.

The files lie in a folder of this user alone (`heliostat-tables-UID` in the folder for temporary files). A table is made by one
process while the others wait; where no file can be written, each process keeps a table of its own. Files that none has opened
for a day are deleted when the next is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from heliostat.storage import local_files

log = logging.getLogger(__name__)

LARGE = 1_000_000  # rows
WAIT_S = 600  # for another process that makes the same table


def table(key: object, build: Callable[[], pa.Table]) -> pa.Table:
    """Returns the table that `build` makes, which is built once on this machine and shared by its processes through a file.

    `key` is JSON-like and names everything that the table depends on.
    """
    file = local_files.cache("tables") / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.arrow"
    if (opened := _open(file)) is not None:
        return opened
    try:
        with local_files.alone(file, WAIT_S):
            if (opened := _open(file)) is not None:
                return opened
            built = build()
            _write(file, built)
            return _open(file) or built
    except (OSError, pa.ArrowException) as e:
        log.warning("%s: can't share a table there (%s), so this process keeps its own", file.parent, e)
        return build()


def _open(file: Path) -> pa.Table | None:
    """Opens the table in the file; None if there is none, or if another user could have written it."""
    try:
        if not local_files.is_ours(file.parent) or not file.is_file():
            return None
        os.utime(file)
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowException):
        return None


def _write(file: Path, table: pa.Table) -> None:
    """Writes the table whole or not at all, and removes files that have not been used for a day."""
    local_files.remove_unused(file)
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
