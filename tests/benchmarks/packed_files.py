"""Measures reading a large compressed file of JSON lines: in one task, and divided into parts that several tasks read.

    python -m tests.benchmarks.packed_files [--mb 1000] [--tasks 2] [--times 3] [--forms zst-frames zst gz wet]

The file has so many MB of the standard library's source, decompressed, as documents of a few kilobytes. `zst-frames` has frames
of 8 MB, `zst` and `gz` are one frame, and `wet` is a web archive with a gzip member per document. A task of the table is the task
that reads in `data prepare`, without stages. Prints for each form, interleaved: CPU seconds of one task for the complete file, of
the surveys, and of the tasks for the parts, and the wall-clock seconds of both ways.
"""

from __future__ import annotations

import json
import random
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import pyarrow as pa
from heliostat.curation import pieces, segment
from heliostat.curation.pieces import FilePart
from heliostat.curation.readers import survey
from heliostat.curation.readers.survey import Survey
from heliostat.curation.text import tasks
from heliostat.curation.text.documents import TextRules
from heliostat.storage.locations import Location

from tests.benchmarks import harness

FRAME, CHARS, RUN_BYTES = 8 << 20, 4000, 32 << 20


class ReadSeconds(NamedTuple):
    """Holds the CPU seconds of surveys and of reading, the wall-clock seconds of both, and the number of parts."""

    survey: float
    read: float
    wall: float
    parts: int


def write(path: Path, form: str, mb: int) -> None:
    """Writes JSON lines with random parts of the standard library's source."""
    rng = random.Random(0)
    sources = [f.read_text(errors="replace") for f in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    text = "".join(sources)
    codec = "zstd" if form.startswith("zst") else "gzip"
    most = {"zst-frames": FRAME, "wet": 1}.get(form, mb * 1_000_000)
    left = mb * 1_000_000
    with path.open("wb") as file:
        while left > 0:
            sink = cast(BinaryIO, _Kept(file))
            with pa.CompressedOutputStream(pa.PythonFile(sink, "w"), codec) as stream:
                written = 0
                while left > 0 and written < most:
                    start = rng.randrange(len(text) - CHARS)
                    one = _record(text[start : start + CHARS], form)
                    stream.write(one)
                    written, left = written + len(one), left - len(one)


def _record(text: str, form: str) -> bytes:
    if form != "wet":
        return json.dumps({"text": text}).encode() + b"\n"
    data = text.encode()
    return b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n%b\r\n\r\n" % (len(data), data)


class _Kept:
    """Wraps a file that stays open when a frame ends."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.write, self.flush = file.write, file.flush

    def close(self) -> None:
        """Does nothing."""


def surveyed(folder: str, part: FilePart, target: int) -> tuple[Survey, float]:
    began = time.process_time()
    record = tasks.survey(Location(f"{folder}/spill"), folder, part, target, 1 << 40)
    return Survey.of(cast(dict[str, dict[str, object]], record)["survey"]), time.process_time() - began


def read(folder: str, part: FilePart) -> float:
    source = tasks.TextSource(folder, TextRules())
    return harness.cpu(lambda: segment.over_pieces(Location(f"{folder}/spill"), [part], source, [], RUN_BYTES, True))


def whole(folder: str, file: FilePart, pool: ProcessPoolExecutor) -> ReadSeconds:
    began = time.perf_counter()
    seconds = pool.submit(read, folder, file).result()
    return ReadSeconds(0, seconds, time.perf_counter() - began, 1)


def divided(folder: str, file: FilePart, pool: ProcessPoolExecutor) -> ReadSeconds:
    began, target = time.perf_counter(), pieces.size(file.bytes)
    ranges = [part for (part,) in pieces.cut([file], target, lambda path: True)]
    found = list(pool.map(surveyed, *zip(*((folder, part, target) for part in ranges), strict=True)))
    parts = survey.split(ranges, [one for one, _ in found], 1 << 40)
    assert parts is not None, "the surveys fit together"
    seconds = sum(pool.map(read, [folder] * len(parts), parts))
    return ReadSeconds(sum(one for _, one in found), seconds, time.perf_counter() - began, len(parts))


def main() -> None:
    options = harness.arguments(__doc__, mb=1000, tasks=2, times=3, forms=["zst-frames", "zst", "gz", "wet"])
    harness.head("file", "MB", "one task, CPU s", "surveys, CPU s", "parts", "all parts, CPU s", "one task, s", "divided, s")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.tasks, get_context("spawn")) as pool:
        for form in options.forms:
            path = Path(folder, "a.wet.gz" if form == "wet" else f"{form}.jsonl.{form.partition('-')[0]}")
            write(path, form, options.mb)
            info = path.stat()
            file = FilePart(path.name, info.st_size, info.st_mtime_ns)
            ways = {
                "whole": lambda file=file: whole(folder, file, pool),
                "divided": lambda file=file: divided(folder, file, pool),
            }
            found = harness.by_turns(ways, options.times)
            one, many = found["whole"], found["divided"]
            harness.row(form, round(info.st_size / 1e6), harness.spread([r.read for r in one], ".1f"),
                harness.spread([r.survey for r in many], ".1f"), many[0].parts, harness.spread([r.read for r in many], ".1f"),
                harness.spread([r.wall for r in one], ".0f"), harness.spread([r.wall for r in many], ".0f"))  # fmt: skip
            path.unlink()


if __name__ == "__main__":
    main()
