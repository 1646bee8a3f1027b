"""Measures the driver's memory and CPU time for the rows of a manifest: from the records of shards to the published file.

    python -m tests.benchmarks.manifest_rows [--row-groups 1000000]

The records are synthetic: 30 row groups per shard and 4 shards per task, in any order, as tasks of a text pipeline return them.
The driver parses each record from JSON, like a run that resumes. Each size runs in a separate process. Memory is
the process's own growth, without the libraries, in MiB: held while the tasks run, and the peak while the manifest is written.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from heliostat.data import manifest
from heliostat.data.row_groups import ListedShard, ShardCollector
from heliostat.storage.locations import Location

from tests.benchmarks import harness

PER_SHARD, SHARDS = 30, 4  # row groups per shard, and shards per task


def shard(rng: random.Random, number: int) -> ListedShard:
    columns: Any = {
        "rows": [rng.randrange(500, 1000) for _ in range(PER_SHARD)],
        "tokens": [rng.randrange(900_000, 1_000_000) for _ in range(PER_SHARD)],
        "bytes": [rng.randrange(1_500_000, 2_000_000) for _ in range(PER_SHARD)],
        "place": [rng.randrange(manifest.PLACES) for _ in range(PER_SHARD)],
        "content": [f"{rng.getrandbits(128):032x}" for _ in range(PER_SHARD)],
    }
    path = f"shards/{number:05d}/{rng.getrandbits(64):016x}.parquet"
    return {"path": path, "file_bytes": 60_000_000, "footer": f"{rng.getrandbits(128):032x}", "row_groups": columns}


def measure(count: int) -> list[float]:
    """Collects and writes the rows of `count` row groups. Returns the bytes of a record as JSON per row group, held MiB, and peak
    MiB, then per row group: bytes of the file, and CPU microseconds for parsing and collecting, sorting, writing."""
    pa.array([0], pa.int64())  # imports pandas
    rng, shards = random.Random(0), ShardCollector()
    tasks, start, received = range(count // (PER_SHARD * SHARDS)), harness.memory("VmRSS"), 0.0
    total = len(tasks) * PER_SHARD * SHARDS
    for task in rng.sample(tasks, len(tasks)):
        record = json.dumps([shard(rng, task * SHARDS + number) for number in range(SHARDS)])
        began = time.process_time()
        for one in json.loads(record):
            shards.add(one)
        received += time.process_time() - began
    stored, held = len(record) / PER_SHARD / SHARDS, harness.memory("VmRSS") - start
    harness.forget_peak()
    began = time.process_time()
    rows = shards.rows()
    made = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        manifest.write(Location(folder), rows, {"kind": "tokens", "vocab_size": 50_000})
        ended, peak = time.process_time(), harness.memory("VmHWM") - start
        file = Path(folder, manifest.FILE).stat().st_size
    seconds = [1e6 * part / total for part in (received, made - began, ended - made)]
    return [stored, held, peak, file / total, *seconds]


def main() -> None:
    options = harness.arguments(__doc__, row_groups=[100_000, 1_000_000], rounds=3)
    harness.head("row groups", "record, bytes", "held, MiB", "peak, MiB", "file, bytes", "parse, us", "sort, us", "write, us")
    for count in options.row_groups:
        found = [harness.apart(measure, count)[0] for _ in range(options.rounds)]
        harness.row(f"{count:,}", *(harness.spread(list(values), ".2f") for values in zip(*found, strict=True)))


if __name__ == "__main__":
    main()
