"""Encodes images in a stream (`curation.streaming`), if actors have GPUs: CPUs read and decode images, actors encode these
images, and CPUs write the results to temporary files.

A block has some batches. They are the batches of the recorded tasks (`deal`), so the values are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from ray.util.queue import Queue

from heliostat.curation.images import encoding, tasks
from heliostat.curation.images.encoding import Encoding
from heliostat.curation.images.tasks import Shards
from heliostat.curation.segment import SpilledRun
from heliostat.curation.streamed import (
    Operators,
    Stopwatch,
    block,
    blocks,
    each,
    guarded,
    noted,
    received,
    sent,
    unpacked,
    with_files,
)
from heliostat.storage.locations import Location
from heliostat.tasks.clusters import Task
from heliostat.tasks.work import key

KIND = "deal"  # of the recorded tasks
BLOCK_BYTES = 64 << 20  # bytes of the decoded images of a block, approximately
BLOCK_IMAGES = 256  # images of a block, approximately: a caption's embeddings can be much larger than a small image


class DealtImages(NamedTuple):
    """Holds the temporary files of a task's images, and for each block the facts about features, and the errors of the other
    columns (`encoding.noted`). `errors` is [None] if an earlier version of heliostat measured no errors."""

    runs: list[SpilledRun]
    features: list[dict[str, Any] | None]
    errors: list[dict[str, Any] | None]


def dealt(record: dict[str, Any]) -> DealtImages:
    """Returns the results in the record of a task, of the stream or not."""
    parts = record.get("records", [record])
    runs = [SpilledRun(*part["dealt"]) for part in parts if "dealt" in part]
    errors = [part["errors"] for part in parts if "errors" in part]
    facts = [part["features"] for part in parts if "features" in part]
    return DealtImages(runs, facts, errors if len(errors) >= len(runs) else [None])


@dataclass(frozen=True)
class EncodingStream:
    """Describes the stream (`streamed.StreamForm`)."""

    encoding: Encoding
    shards: Shards
    gpus: int
    gpus_each: float
    kind = KIND

    def key(self, task: str) -> str:
        return key("stream", task)

    def sent(self, number: int, task: Task) -> bytes:
        return sent(number, task.arguments["run"])

    def operators(self, folder: Location, lacking: Queue) -> Operators:
        read = ReadImages(folder, self.encoding, self.shards)
        return Operators(read, EncodeImages, (folder, self.encoding, lacking), WriteImages(folder))


@dataclass(frozen=True)
class ReadImages:
    """Reads the images of temporary files, and decodes them, in blocks of some batches."""

    folder: Location
    encoding: Encoding
    shards: Shards

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for item in filter(None, batch["id"].to_pylist()):
            task, run = received(item)
            assert isinstance(run, SpilledRun)
            yield from guarded(task, blocks(task, KIND, self._groups(run)))

    def _groups(self, run: SpilledRun) -> Iterator[list[pa.Table]]:
        group, size, count = list[pa.Table](), 0, 0
        for images in self.encoding.batches(tasks.dealt(self.folder, run, self.shards)):
            group.append(images)
            size, count = size + images.nbytes, count + len(images)
            if size >= BLOCK_BYTES or count >= BLOCK_IMAGES:
                yield group
                group, size, count = [], 0, 0
        if group:
            yield group


class EncodeImages:
    """Encodes the batches of blocks in an actor that keeps the encoders."""

    def __init__(self, folder: Location, encoding: Encoding, lacking: Queue) -> None:
        self.folder, self.encoding, self.lacking = folder, encoding, lacking

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from each(batch, self._encoded)

    def _encoded(self, one: dict[str, Any]) -> pa.Table:
        watch = Stopwatch()
        encoder = with_files(self.lacking, lambda: self.encoding.encoder(self.folder))
        watch.opened()
        encoded = [encoder(images, self.encoding.captions) for images in unpacked(one["tables"])]
        record = noted(KIND, watch, **encoding.noted(encoded))
        return block(
            one["task"], one["block"], one["last"], [*json.loads(one["records"]), record], [part.table for part in encoded]
        )


@dataclass(frozen=True)
class WriteImages:
    """Writes the encoded images of a block to a temporary file, sorted by shard. Yields blocks with only `records`."""

    folder: Location

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from each(batch, self._written)

    def _written(self, one: dict[str, Any]) -> pa.Table:
        watch, records = Stopwatch(), json.loads(one["records"])
        if tables := unpacked(one["tables"]):
            done = tasks.stored(self.folder, tables)
            records.append(noted(KIND, watch) | done)
        return block(one["task"], one["block"], one["last"], records, [])
