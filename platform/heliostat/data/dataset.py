"""The run's data: the job's prepared datasets, their split and order, and reading samples from the shards.

`DataPlan` is small, plain data: what fixes every sample of the run. It is stored with each checkpoint and sent to the
fetch tasks, which rebuild the rest (`Dataset`) from the manifests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data import manifest
from heliostat.data.manifest import Manifest
from heliostat.data.order import Order, Samples, Shape, Split, choose_shape, hold_out
from heliostat.errors import ConfigError, DataError
from heliostat.spec import Job
from heliostat.storage import Location

READERS = 8  # threads: a window's chunks are read at once, because object storage answers slowly but in parallel


@dataclass(frozen=True)
class DataPlan:
    """All that the global sequence follows from, and where the shards are."""

    uris: tuple[str, ...]
    digests: tuple[str, ...]
    weights: tuple[float, ...]
    sequence_length: int | None
    seed: int
    held_fraction: float
    shape: Shape

    def dump(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def parse(raw: dict[str, Any]) -> DataPlan:
        lists = {k: tuple(raw[k]) for k in ("uris", "digests", "weights")}
        return DataPlan(**{**raw, **lists, "shape": Shape(**raw["shape"])})

    @property
    def digest(self) -> str:
        """Names the global sequence; moving a dataset elsewhere does not change it."""
        fixed = {k: v for k, v in self.dump().items() if k != "uris"}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:32]

    def differences(self, other: DataPlan) -> list[str]:
        """What changed from this plan to `other`, one line each, in the job file's words."""
        names = {"digests": "the datasets' content", "weights": "data.sources weights", "sequence_length": "data.sequence_length",
                 "seed": "data.seed", "held_fraction": "evaluate.fraction"}  # fmt: skip
        mine, theirs = self.dump(), other.dump()
        lines = [f"{label}: {mine[key]} -> {theirs[key]}" for key, label in names.items() if mine[key] != theirs[key]]
        shape = {"batch": "train.global_batch", "lanes": "data.lanes", "superstep": "the superstep", "window": "data.window"}
        return lines + [
            f"{label}: {mine['shape'][key]} -> {theirs['shape'][key]}"
            for key, label in shape.items()
            if mine["shape"][key] != theirs["shape"][key]
        ]


def plan(job: Job, manifests: list[Manifest], recorded: DataPlan | None = None) -> DataPlan:
    """The plan for a job; what the job leaves open (lanes, window) is taken from the `recorded` plan of a run resumed."""
    length = job.data.sequence_length
    sample_bytes = (
        4 * length if length else max(1, sum(m.chunks["bytes"].to_numpy().sum() for m in manifests) // _rows(manifests))
    )
    lanes = job.lanes if job.data.lanes or recorded is None else recorded.shape.lanes
    if (
        recorded is not None
        and lanes == recorded.shape.lanes
        and job.train.global_batch == recorded.shape.batch
        and not job.data.window
    ):
        shape = recorded.shape
    else:
        shape = choose_shape(job.train.global_batch, lanes, int(sample_bytes), job.data.window)
    if lanes % job.workers.count:
        raise ConfigError(f"workers.count: {job.workers.count} does not divide the run's {lanes} lanes")
    return DataPlan(
        uris=tuple(s.path for s in job.data.sources),
        digests=tuple(m.digest for m in manifests),
        weights=tuple(s.weight for s in job.data.sources),
        sequence_length=length,
        seed=job.data.seed,
        held_fraction=job.evaluate.fraction if job.evaluate else 0.0,
        shape=shape,
    )


def _rows(manifests: list[Manifest]) -> int:
    return max(1, sum(m.rows for m in manifests))


def split(source: Manifest, sequence_length: int | None, fraction: float) -> Split:
    """Training and held-out samples of a dataset, by hash of each chunk's content digest and number."""
    footers = source.chunks["footer"].to_pylist()
    numbers = source.chunks["row_group"].to_numpy().astype(np.uint64)
    identity = np.array([int(f[:16], 16) for f in footers], dtype=np.uint64) + numbers
    return hold_out(source.samples(sequence_length), identity, fraction)


class Dataset:
    """A DataPlan with its manifests read: the order, and the samples themselves."""

    def __init__(self, plan: DataPlan) -> None:
        self.plan = plan
        self.sources = [manifest.read(Location(uri)) for uri in plan.uris]
        for uri, source, expected in zip(plan.uris, self.sources, plan.digests, strict=True):
            if source.digest != expected:
                raise DataError(f"{uri}: the dataset changed under the run (digest {source.digest[:12]}, was {expected[:12]})")
        splits = [split(s, plan.sequence_length, plan.held_fraction) for s in self.sources]
        self.order = Order(splits, list(plan.weights), plan.seed, plan.shape)
        self._paths = [s.chunks["path"].to_pylist() for s in self.sources]
        self._groups = [s.chunks["row_group"].to_numpy() for s in self.sources]
        self._token_counts = [s.chunks["tokens"].to_numpy() for s in self.sources]

    def read(self, samples: Samples) -> np.ndarray:
        """The samples' contents in order: int32 [n, sequence_length]. Each chunk is read once, several at a time."""
        assert self.plan.sequence_length, "only token datasets have contents of one length"
        length = self.plan.sequence_length
        out = np.empty((len(samples), length), dtype=np.int32)
        chunk_ids, which = np.unique(np.stack([samples.source, samples.chunk]), axis=1, return_inverse=True)

        def fill(i: int) -> None:
            mine = np.flatnonzero(which == i)
            tokens = self._tokens(int(chunk_ids[0, i]), int(chunk_ids[1, i]))
            whole = tokens[: len(tokens) // length * length].reshape(-1, length)
            out[mine] = whole[samples.row[mine]]

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, range(chunk_ids.shape[1])))
        return out

    def _tokens(self, source: int, chunk: int) -> np.ndarray:
        """All tokens of a chunk, int32, documents end to end."""
        location = self.sources[source].location.join(self._paths[source][chunk])
        try:
            with location.open() as f:
                table = pq.ParquetFile(f, page_checksum_verification=True, pre_buffer=True).read_row_group(
                    int(self._groups[source][chunk]), columns=["tokens"]
                )
            tokens = table["tokens"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
        except FileNotFoundError as e:
            raise DataError(f"{location}: the shard is missing") from e
        except (pa.ArrowException, OSError, IndexError, KeyError, ValueError) as e:
            raise DataError(f"{location}: cannot read row group {self._groups[source][chunk]} ({str(e).splitlines()[0]})") from e
        if len(tokens) != (expected := self._token_counts[source][chunk]):
            raise DataError(f"{location}: row group {self._groups[source][chunk]} has {len(tokens)} tokens, not {expected}")
        return tokens


@lru_cache(maxsize=2)
def open_dataset(plan: DataPlan) -> Dataset:
    """The Dataset of a plan, kept per process: fetch tasks run many times in one."""
    return Dataset(plan)
