"""Defines a contender's task, and the consumption of a batch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FILES = 16  # a multiple of every number of consumers, so that nobody gets fewer files


@dataclass(frozen=True)
class Task:
    """Describes one measurement. `folder`: the dataset's folder, on disk or `s3://bucket/...`, with parquet/, mds/, and tar/."""

    contender: str
    kind: str  # "tokens" or "images"
    folder: str
    endpoint: str | None  # HOST:PORT of the S3 server
    consumers: int
    samples: int
    length: int  # tokens of a sample
    batch: int  # samples, per consumer
    window: int  # samples that are shuffled together, over all consumers
    scratch: str  # an empty folder

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> Task:
        return Task(**json.loads(text))

    @property
    def loader_workers(self) -> int:
        """Returns the number of a torch DataLoader's processes: the machine's cores, shared by the consumers, at least one."""
        return max(1, (os.cpu_count() or 1) // self.consumers)

    @property
    def buffer(self) -> int:
        """Returns the samples in each loader worker's shuffle buffer, so that all buffers together hold a window."""
        return max(self.batch, self.window // (self.consumers * self.loader_workers))

    def files(self, form: str, suffix: str) -> list[str]:
        return [f"{self.folder}/{form}/{i:05d}.{suffix}" for i in range(FILES)]

    def http(self, path: str) -> str:
        """Returns the path as a plain HTTP address of the S3 server (it needs no signature)."""
        return f"http://{self.endpoint}/{path.removeprefix('s3://')}" if self.endpoint else path

    def filesystem(self) -> Any:
        import pyarrow.fs as pafs

        if not self.endpoint:
            return pafs.LocalFileSystem()
        return pafs.S3FileSystem(endpoint_override=self.endpoint, scheme="http", region="us-east-1")

    @property
    def columns(self) -> list[str]:
        """Returns the columns to read from the Parquet files, the samples' first."""
        return ["tokens"] if self.kind == "tokens" else ["image", "caption"]

    def path(self, path: str) -> str:
        """Returns the path in the form of `filesystem`."""
        return path.removeprefix("s3://")


def consume(batches: Iterable[Any]) -> dict[str, Any]:
    """Reads every value: count and sum prove that each sample came once.

    Times are of the monotonic clock: of the first and last batch, and of those that complete a quarter and three quarters of all
    samples.
    """
    counts, total, times = [], 0, []
    for batch in batches:
        counts.append(len(batch))
        total += touch(batch)
        times.append(time.monotonic())
    there = np.cumsum(counts)
    quarter, rest = (int(np.searchsorted(there, part * there[-1] / 4)) for part in (1, 3))
    return {
        "count": int(there[-1]),
        "sum": total,
        "first": times[0],
        "last": times[-1],
        "quarter": times[quarter],
        "three_quarters": times[rest],
        "between": int(there[rest] - there[quarter]),
    }


def touch(batch: Any) -> int:
    if isinstance(batch, np.ndarray):
        return int(batch.sum(dtype=np.int64))
    return sum(int(np.frombuffer(image, np.uint8).sum(dtype=np.int64)) for image in batch)
