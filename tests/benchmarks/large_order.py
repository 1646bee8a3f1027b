"""Measures memory and seconds of a process that opens a run's data with very many row groups, and a mix of many sources.

    python -m tests.benchmarks.large_order [--chunks 25000000] [--folder FOLDER]

The manifest is synthetic (random sizes, places, and content digests, without shards). `manifest.write` writes it, and
`open_dataset` opens it, like workers and fetch tasks. Each row is a separate process. `own` is its private memory without files;
`mapped` is memory of files, which all processes of the machine share, as far as this process has used it. Both exclude the
libraries. The folder takes 200 bytes per row group.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from heliostat.data import manifest
from heliostat.data.dataset import DataPlan, make_order, open_dataset
from heliostat.data.mixing import Shape
from heliostat.data.order import Order
from heliostat.data.split import Split
from heliostat.storage.locations import Location

from tests.benchmarks import harness

PER_SHARD = 30
SHAPE = Shape(batch=1024, lanes=64, steps_per_block=4, window=65_536)
SOURCES, DIGITS = 100, 6


def plan(folder: Path, digest: str) -> DataPlan:
    return DataPlan((str(folder),), (digest,), ((0, (1.0,)),), (None,), 2048, 5, 0.01, SHAPE)


def write(folder: Path, chunks: int) -> str:
    """Writes the manifest of a dataset, as `prepare` does at its end."""
    rng, numbers = np.random.default_rng(0), np.arange(chunks)
    of = pa.array(numbers // PER_SHARD, pa.int32())
    shards = range(-(-chunks // PER_SHARD))
    letters = np.frombuffer(b"0123456789abcdef", np.uint8)[rng.integers(0, 16, 32 * chunks, np.uint8)]
    offsets = np.arange(0, 32 * chunks + 1, 32, dtype=np.int32)
    table = pa.table({
        "path": pa.DictionaryArray.from_arrays(of, [f"shards/{n:07d}.parquet" for n in shards]),
        "row_group": pa.array(numbers % PER_SHARD, pa.int32()),
        "rows": rng.integers(50, 100, chunks),
        "tokens": rng.integers(60_000, 65_536, chunks),
        "bytes": rng.integers(90_000, 100_000, chunks),
        "file_bytes": numbers // PER_SHARD + 3_000_000,
        "footer": pa.DictionaryArray.from_arrays(of, [f"{n:032x}" for n in shards]),
        "place": rng.integers(0, manifest.PLACES, chunks),
        "content": pa.StringArray.from_buffers(chunks, pa.py_buffer(offsets), pa.py_buffer(letters)),
    })  # fmt: skip
    del letters, offsets, numbers, of
    made = manifest.write(Location(str(folder)), table, {"kind": "tokens", "vocab_size": 50_000})
    return made.digest


def visit(folder: Path, digest: str) -> str:
    """Opens the dataset, and locates a window's samples at the start of the first epoch and of the second."""
    began = time.perf_counter()
    data = open_dataset(plan(folder, digest))
    opened = time.perf_counter()
    data.order.locate(np.arange(SHAPE.window))
    first = time.perf_counter()
    size = int(data.order.epoch_samples[0])
    data.order.locate(np.arange(size, size + SHAPE.window))
    second = time.perf_counter()
    times = [time.perf_counter()]
    for window in range(2, 12):
        data.order.locate(np.arange(window * SHAPE.window, (window + 1) * SHAPE.window))
        times.append(time.perf_counter())
    return (f"open {opened - began:.1f} s, first window {first - opened:.2f} s, first of the next epoch {second - first:.2f} s, "
            f"each further one {np.median(np.diff(times)) * 1e3:.0f} ms")  # fmt: skip


def drive(folder: Path, digest: str) -> str:
    """Reads the manifest and makes the order, like the command that starts a run."""
    began = time.perf_counter()
    source = manifest.share(lambda: manifest.read(Location(str(folder)), digest))
    read = time.perf_counter()
    order = make_order(plan(folder, digest), [source])
    return f"read {read - began:.1f} s, order of {order.epoch_samples[0]:,} samples {time.perf_counter() - read:.1f} s"


def mix(folder: Path, digest: str) -> str:
    """Builds the order of many sources whose weights have six digits, and lays out windows far and near."""
    rng = np.random.default_rng(0)
    parts = rng.integers(1, 2 * 10**DIGITS // SOURCES, SOURCES)
    weights = [float(w) / 10**DIGITS for w in parts]
    sizes = np.full(1000, 10_000, np.int64)
    whole = Split(sizes, np.zeros(1000, np.int64), np.zeros(1000, np.int64))
    began = time.perf_counter()
    order = Order([whole] * SOURCES, [(0, weights)], 5, SHAPE)
    built = time.perf_counter()
    order.locate(np.arange(SHAPE.window))
    first = time.perf_counter()
    far = 10**9 // SHAPE.window * SHAPE.window
    order.locate(np.arange(far, far + SHAPE.window))
    period = order.sections[0].mixture.period
    return (f"{SOURCES} sources, a period of {period:,}: order {built - began:.2f} s, first window {first - built:.2f} s, one at "
            f"1e9 samples {time.perf_counter() - first:.2f} s")  # fmt: skip


PARTS: dict[str, Callable[[Path, str], str]] = {
    "the first process": visit,
    "every other": visit,
    "the driver": drive,
    "a mix": mix,
}


def memory() -> tuple[float, float]:
    """Returns the current (own, mapped) megabytes of this process."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE))
    own = int(found["Anonymous"])
    return own * 1.024e-3, (int(found["Rss"]) - own) * 1.024e-3


def part(name: str, folder: str, digest: str) -> list[str]:
    """Runs one of PARTS; returns its row."""
    before = memory()
    said = PARTS[name](Path(folder), digest)
    own, shared = (after - start for after, start in zip(memory(), before, strict=True))
    peak = harness.memory("VmHWM") * 1.048576 - sum(before)
    return [f"{own:,.0f}", f"{shared:,.0f}", f"{peak:,.0f}", said]


def written(folder: str, chunks: int) -> list[str]:
    """Writes the manifest; returns its digest, and a line about it."""
    began = time.perf_counter()
    digest = write(Path(folder), chunks)
    peak = harness.memory("VmHWM") * 1.048576
    return [digest, f"{chunks:,} chunks; written in {time.perf_counter() - began:.0f} s by a process of up to {peak:,.0f} MB"]


def main() -> None:
    given = harness.arguments(__doc__, chunks=25_000_000, folder={"type": Path})
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        (digest, line), _ = harness.apart(written, folder, given.chunks, TMPDIR=folder)
        print(line)
        harness.head("process", "own, MB", "mapped, MB", "peak of both, MB", "")
        for name in PARTS:
            harness.row(name, *harness.apart(part, name, folder, digest, TMPDIR=folder)[0])
        print(f"files: {sum(f.stat().st_size for f in Path(folder).glob('heliostat-tables-*/*')) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
