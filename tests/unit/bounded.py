"""Readings in processes of their own, whose memory is bounded or measured: forks of one that has imported the libraries."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from heliostat.curation import segment
from heliostat.curation.pieces import Part
from heliostat.pipelines.images import sources as image_sources
from heliostat.pipelines.text import tasks
from heliostat.pipelines.text.documents import Rules
from heliostat.pipelines.text.tasks import TextSource
from heliostat.storage import Location

from tests.fork_server import Done, ForkServer

MORE = 400 << 20  # bytes that a reader may take beside those that it has
MODULE = "tests.unit.bounded"
SERVER = ForkServer((MODULE,), {})


def run(function: str, *arguments: str) -> Done:
    """Calls one of the functions below in a process of its own."""
    return SERVER.run(f"{MODULE}:{function}", arguments)


def read(arguments: list[str]) -> int:
    """Reads a file of a folder with at most MORE memory than before, and prints why the last part of it was left out."""
    folder, name, limit = arguments
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MORE,) * 2)
    if name.endswith(".tar") or name.startswith("image"):
        task, limits = {"kind": "archive", "path": name}, image_sources.Limits(int(limit))
        found = image_sources.read(folder, task, image_sources.Columns(), limits)
    else:
        found = tasks.read_file(Location(folder), name, Rules(max_file_bytes=int(limit)))
    for last in found:
        reason = getattr(last, "reason", "kept")
    os.write(1, reason.encode())
    return 0


def make(arguments: list[str]) -> int:
    """Reads a file and gathers a shard; prints the number of runs, and the most MiB that reading took, and that both did."""
    folder, limit, name = arguments
    source, work = TextSource(folder, Rules()), Location(f"{folder}.work")
    list(source.read(Part("a.jsonl", 0, 0, 0, 1)))
    before = peak()
    record = segment.over_pieces(work, [Part(name, 0, 0)], source, [], int(limit) // 8, False)
    runs = [segment.Run(*run) for run in record["runs"]]
    reading = peak()
    tasks.gather(work, runs, 0, 1 << 59, False)
    os.write(1, f"{len(runs)} {(reading - before) >> 10} {(peak() - before) >> 10}".encode())
    return 0


def peak() -> int:
    """The most KiB of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
