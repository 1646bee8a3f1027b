"""Limits the memory of a reader in a fork of a process with the libraries imported, and measures the peak memory of a call."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from heliostat.curation.images import sources as image_sources
from heliostat.curation.text import tasks
from heliostat.curation.text.documents import TextRules
from heliostat.storage.locations import Location

from tests.fork_server import Done, ForkServer

MORE = 400 << 20  # bytes that a reader may take beside those that it has
MODULE = "tests.unit.bounded"
SERVER = ForkServer((MODULE,), {})


def read(folder: Path, name: str, limit: int) -> Done:
    """Reads a file of a folder with at most MORE bytes of memory in addition to the process's own; prints the reason for the last
    dropped part."""
    return SERVER.run(f"{MODULE}:forked", [str(folder), name, str(limit)])


def forked(arguments: list[str]) -> int:
    """Does the work of `read` in this process."""
    folder, name, limit = arguments
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MORE,) * 2)
    with contextlib.suppress(MemoryError):
        bytearray(2 * MORE)
        raise AssertionError("the memory of this process is not bounded")
    if name.endswith(".tar") or name.startswith("image"):
        task, limits = (
            {"kind": "archives", "parts": [{"path": name, "bytes": 0, "modified": 0}]},
            image_sources.ImageLimits(int(limit)),
        )
        found = image_sources.read(folder, task, image_sources.ImageColumns(), limits)
    else:
        found = tasks.read_file(Location(folder), name, TextRules(max_file_bytes=int(limit)))
    for last in found:
        reason = getattr(last, "reason", "kept")
    os.write(1, reason.encode())
    return 0


def arrow_peak(work: Callable[[], object]) -> int:
    """Returns the peak number of bytes that Arrow allocated during a call."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        held = work()
        del held
    finally:
        pa.set_memory_pool(before)
    return pool.max_memory()


def resident_peak(work: Callable[[], object]) -> int:
    """Returns by how many bytes the process's memory grew during a call, at the peak. This includes memory of compiled code."""

    def status(name: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])

    ctypes.CDLL(None).malloc_trim(0)  # memory that is free in the process would be used first
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def python_peak(work: Callable[[], object]) -> int:
    """Returns the peak number of bytes that Python and NumPy allocated during a call."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
