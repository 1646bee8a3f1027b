"""Computes log-probabilities in a stream (`curation.streaming`), if actors have GPUs: CPUs read the row groups of shards, actors
compute their log-probabilities, and CPUs write these values to temporary files.

A block is a row group, so the actors share the row groups of a large shard. The batches are those of the recorded tasks
(`computing.compute`), so the values are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from ray.util.queue import Queue

from heliostat.curation.references import computing
from heliostat.curation.references.computing import KIND, ReferenceModel, SourceShard
from heliostat.curation.streamed import (
    Operators,
    Stopwatch,
    block,
    blocks,
    each,
    guarded,
    noted,
    unpacked,
    with_files,
)
from heliostat.data.conversations import REFERENCE_COLUMNS
from heliostat.storage.locations import Location
from heliostat.tasks import shipping, spill
from heliostat.tasks.clusters import Task
from heliostat.tasks.work import key


@dataclass(frozen=True)
class ReferenceStream:
    """Describes the stream (`streamed.StreamForm`)."""

    model: ReferenceModel
    gpus: int
    gpus_each: float
    kind = KIND

    def key(self, task: str) -> str:
        return key("stream", task)

    def sent(self, number: int, task: Task) -> bytes:
        return json.dumps([number, asdict(task.arguments["shard"])]).encode()

    def operators(self, folder: Location, lacking: Queue) -> Operators:
        return Operators(read, ScoreGroups, (folder, self.model, lacking), WriteValues(folder))


def read(batch: pa.Table) -> Iterator[pa.Table]:
    """Reads the row groups of shards, one per block."""
    for sent in filter(None, batch["id"].to_pylist()):
        task, shard = json.loads(sent)
        yield from guarded(task, blocks(task, KIND, _row_groups(SourceShard(**shard))))


def _row_groups(shard: SourceShard) -> Iterator[list[pa.Table]]:
    file = shard.read()
    for group in range(file.num_row_groups):
        yield [computing.pairs_of(file, group)]


class ScoreGroups:
    """Replaces the rows of blocks with their log-probabilities, in an actor that keeps the model."""

    def __init__(self, folder: Location, model: ReferenceModel, lacking: Queue) -> None:
        self.folder, self.model, self.lacking = folder, model, lacking

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from each(batch, self._scored)

    def _scored(self, one: dict[str, Any]) -> pa.Table:
        watch, tables = Stopwatch(), unpacked(one["tables"])
        path = with_files(self.lacking, lambda: shipping.here(self.folder, self.model.shipment))
        loaded = computing.loaded_once(path, self.model)
        watch.opened()
        scored = [pa.table(list(computing.logprobs(loaded, rows, self.model).T), names=REFERENCE_COLUMNS) for rows in tables]
        return block(one["task"], one["block"], one["last"], [*json.loads(one["records"]), noted(KIND, watch)], scored)


@dataclass(frozen=True)
class WriteValues:
    """Writes the log-probabilities of blocks to temporary files, fp64 [rows, 2]. Yields blocks with only `records`."""

    folder: Location

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from each(batch, self._written)

    def _written(self, one: dict[str, Any]) -> pa.Table:
        watch, records = Stopwatch(), json.loads(one["records"])
        for table in unpacked(one["tables"]):
            values = np.stack([table[name].to_numpy() for name in REFERENCE_COLUMNS], 1)
            name = spill.put(self.folder, values.tobytes(), ".bin")
            records.append(noted(KIND, watch, passed=len(table), values=name) | {"files": [name]})
        return block(one["task"], one["block"], one["last"], records, [])


def values(record: dict[str, Any]) -> list[str]:
    """Returns the names of a task's temporary files, in the order of the rows. `record`: of the stream or not."""
    return [part["values"] for part in record.get("records", [record]) if "values" in part]
