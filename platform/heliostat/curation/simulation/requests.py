"""Counts the requests that tasks send to an object store, for each prefix and second."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from heliostat.curation.images.sources import FILES_PER_TASK
from heliostat.curation.pieces import FilePart
from heliostat.curation.text import ahead
from heliostat.tasks import spill
from heliostat.tasks.advance import FILES
from heliostat.tasks.clusters import Task
from heliostat.tasks.spill import SpilledRun

PART_BYTES = 10 << 20  # of an upload in parts
PLAIN_BYTES = 5 << 20  # a file below this size is written with one request
SPREAD = 256  # prefixes that a store can separate where names begin with a digest: its first two hex digits
FIRST = "/00*"  # one of these prefixes, which stands for all
DIGITS = 3  # last digits of a shard's number: a store can separate prefixes by the digits before
BUCKET_S = 10.0  # seconds over which a rate is averaged
MOST_S = 600.0  # seconds over which a task's requests are spread
NODE_BYTES_PER_S = 100e6  # bytes per second that a CPU's share of the network carries
REQUEST_S = 0.03  # latency of a request to the store


@dataclass
class Requests:
    """Counts requests and bytes by prefix. `busiest`: requests per second in the busiest BUCKET_S seconds of each prefix."""

    total: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: Counter[str] = field(default_factory=Counter)
    buckets: dict[str, defaultdict[int, float]] = field(default_factory=dict)

    def add(self, prefix: str, requests: float, bytes: int, at: float, seconds: float = 0.0) -> None:
        """Counts requests that begin at `at`, and are spread evenly over `seconds` seconds, at most MOST_S."""
        self.total[prefix] += requests
        self.bytes[prefix] += bytes
        buckets, end = self.buckets.setdefault(prefix, defaultdict(float)), at + min(seconds, MOST_S)
        first, last = int(at // BUCKET_S), int(end // BUCKET_S)
        if first == last:
            buckets[first] += requests
            return
        rate = requests / (end - at)
        buckets[first] += rate * ((first + 1) * BUCKET_S - at)
        for bucket in range(first + 1, last):
            buckets[bucket] += rate * BUCKET_S
        buckets[last] += rate * (end - last * BUCKET_S)

    def totals(self) -> dict[str, float]:
        """Returns the requests of each prefix, and of all SPREAD prefixes where one stands for all."""
        return {prefix: total * (SPREAD if prefix.endswith(FIRST) else 1) for prefix, total in self.total.items()}

    def busiest(self) -> dict[str, float]:
        return {prefix: max(buckets.values()) / BUCKET_S for prefix, buckets in self.buckets.items()}

    def of_task(self, kind: str, task: Task, record: dict[str, Any], files: int, footers: int, read: int, stored: int,
                at: float, cpus: int) -> float:  # fmt: skip
        """Counts the requests of a task that begins at `at` (virtual seconds) on `cpus` CPUs, and returns the seconds that the
        task takes. The requests are spread evenly over these seconds, because a task reads and writes while it works. Files whose
        names begin with a digest are spread evenly over their prefixes, so one of SPREAD prefixes stands for all.

        `files`, `read`: the number of temporary files, and the bytes, that the task reads. `stored`: the bytes that the store
        sends for them, because documents are compressed there. `footers`: see `range_reads`. A task reads temporary files in
        advance, and the input's files after the first block.
        """
        inputs = Counter[str]()
        for part in input_parts(task):
            inputs[segment(part)] += part_reads(part)
        ranges = range_reads(files, read, footers)
        sizes = [spill.size_of(name) or 0 for name in record.get("files", [])]
        written = record.get("shards", [record] if "file_bytes" in record else [])
        puts_spilled, puts_shards = sum(map(puts, sizes)), sum(puts(shard["file_bytes"]) for shard in written)
        requests = inputs.total() + ranges + puts_spilled + puts_shards + 1
        storing, of_cpus = requests * REQUEST_S / FILES + stored / NODE_BYTES_PER_S, record["seconds"] / cpus
        first = min(stored, ahead.MOST_AHEAD) / NODE_BYTES_PER_S if inputs else 0.0
        seconds = REQUEST_S + first + max(of_cpus, storing) if files or inputs else of_cpus + storing
        for folder, count in inputs.items():
            self.add(f"input{folder}", count, stored * count // max(1, inputs.total()), at, seconds)
        self.add(f"work/spill{FIRST}", (ranges + puts_spilled) / SPREAD, (stored if files else 0) + sum(sizes), at, seconds)
        self.add(f"work/done/{kind}{FIRST}", 1 / SPREAD, 0, at + seconds)
        for shard in written:  # in a folder for each shard, such as shards/01234
            folder = shard["path"].rpartition("/")[0]
            self.add(f"output/{folder[:-DIGITS]}", puts(shard["file_bytes"]), shard["file_bytes"], at, seconds)
        return seconds


def segment(part: FilePart) -> str:
    """Returns the prefix of an input file: its first folder, such as a segment of a crawl. Descriptions of many files have the
    prefix of the input."""
    described = json.loads(part.description).get("parts") if part.description else None
    path = described[0]["path"] if described else part.path
    folder, slash, _ = path.partition("/")
    return f"/{folder}" if slash and not spill.size_of(path) else ""


def part_reads(part: FilePart) -> int:
    """Returns the number of requests that read a part: at least one for each file."""
    return max(part_files(part), ahead.reads(part.length))


def part_files(part: FilePart) -> int:
    """Returns the number of input files that a part has: its own file, or the files in its description (`images.planning`)."""
    if part.path.endswith(".json") and spill.size_of(part.path):
        description = json.loads(part.description) if part.description else {"entries": range(FILES_PER_TASK)}
        return len(description.get("parts") or description.get("entries", []))
    return 1


def range_reads(files: int, bytes: int, footers: int) -> int:
    """Returns the number of requests that read `bytes` bytes in equal ranges of some temporary files. `footers`: number of files
    whose footer the call hasn't kept. A range is part of one more row group than its bytes need."""
    return footers + files * -(-(bytes // max(1, files) + spill.GROUP_BYTES) // spill.READ_BYTES)


def input_parts(task: Task) -> list[FilePart]:
    """Returns the parts of the input that a task reads."""
    files = [*task.arguments.get("piece", []), task.arguments.get("part")]
    return [part for part in files if isinstance(part, FilePart)]


def files_in(value: object) -> int:
    """Returns the number of temporary files in an argument of a task."""
    if isinstance(value, list):
        return len(value) if value and isinstance(value[0], str | SpilledRun) else 0
    return int(isinstance(value, SpilledRun))


def named(what: str, bytes: int) -> str:
    """Returns the name of a spilled file that doesn't exist, with its size."""
    digest = hashlib.sha256(what.encode()).hexdigest()
    return f"{digest[:2]}/{digest[:32]}-{bytes}.parquet"


def puts(bytes: int) -> int:
    """Returns the number of requests that write a file."""
    return 1 if bytes < PLAIN_BYTES else 2 + -(-bytes // PART_BYTES)
