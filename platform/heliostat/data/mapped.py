"""Shares large tables between the processes of a machine through memory-mapped files, whose pages the kernel may drop and
reread.

Callers keep tables of fewer than LARGE rows in the process's own memory.

The files are in a folder that only this user can write: `heliostat-tables-UID` in the folder for temporary files. One process
makes a table while the others wait. If the file can't be written, each process keeps its own table. When a process writes a file,
it also deletes the files that no process has opened for a day.
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
WAIT_S = 600  # seconds to wait for another process that makes the same table


def table(key: object, build: Callable[[], pa.Table]) -> pa.Table:
    """Returns the table that `build` makes. One process of the machine builds the table, and the other processes open the
    table's file.

    `key`: a value that JSON can represent, with everything that the table depends on.
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
        log.warning("%s: can't share a table in this folder (%s), so this process keeps its own copy", file.parent, e)
        return build()


def _open(file: Path) -> pa.Table | None:
    """Opens the table in a file; None if the file is missing or damaged, or if another user could have written it."""
    try:
        if not local_files.is_ours(file.parent) or not file.is_file():
            return None
        os.utime(file)
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowException):
        return None


def _write(file: Path, table: pa.Table) -> None:
    """Writes the table atomically, and removes files that no process has used for a day."""
    local_files.remove_unused(file)
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
