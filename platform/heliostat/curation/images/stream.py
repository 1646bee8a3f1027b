"""Encodes images in a stream (`curation.table_stream`), if actors have GPUs: CPUs read and decode images, and actors encode these
images. The tables of a block are batches of images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from heliostat.curation import streamed
from heliostat.curation.images import encoding, tasks
from heliostat.curation.images.encoding import Encoding
from heliostat.curation.images.tasks import Shards
from heliostat.curation.segment import SpilledRun
from heliostat.curation.table_stream import TableStream
from heliostat.data.manifest_table import ERRORS
from heliostat.storage.locations import Location
from heliostat.tasks.clusters import Task

if TYPE_CHECKING:
    from heliostat.curation.images.latents import Encoder

KIND = "deal"  # of the recorded tasks
BLOCK_BYTES = 64 << 20  # bytes of the decoded images of a block, approximately
BLOCK_IMAGES = 256  # images of a block, approximately: a caption's embeddings can be much larger than a small image


class DealtImages(NamedTuple):
    """Holds the temporary files of a task's images, and for each block the facts about features, and the errors of the other
    columns (`encoding.noted`). `errors` is [None] if an earlier version of heliostat measured no such errors."""

    runs: list[SpilledRun]
    features: list[dict[str, Any] | None]
    errors: list[dict[str, Any] | None]


def dealt(record: dict[str, Any]) -> DealtImages:
    """Returns the results in the record of a task, of the stream or not."""
    parts = record.get("records", [record])
    runs = [SpilledRun(*part["dealt"]) for part in parts if "dealt" in part]
    errors = [part[ERRORS] for part in parts if ERRORS in part]
    facts = [part["features"] for part in parts if "features" in part]
    return DealtImages(runs, facts, errors if len(errors) >= len(runs) else [None])


@dataclass(frozen=True)
class EncodingStream(TableStream[SpilledRun, "Encoder"]):
    kind = KIND

    encoding: Encoding
    shards: Shards

    def sent(self, number: int, task: Task) -> bytes:
        return streamed.sent(number, task.arguments["run"])

    def received(self, data: bytes) -> tuple[int, SpilledRun]:
        task, run = streamed.received(data)
        assert isinstance(run, SpilledRun)
        return task, run

    def groups(self, folder: Location, source: SpilledRun) -> Iterator[list[pa.Table]]:
        group, size, count = list[pa.Table](), 0, 0
        for images in self.encoding.batches(tasks.dealt(folder, source, self.shards)):
            group.append(images)
            size, count = size + images.nbytes, count + len(images)
            if size >= BLOCK_BYTES or count >= BLOCK_IMAGES:
                yield group
                group, size, count = [], 0, 0
        if group:
            yield group

    def opened(self, folder: Location) -> Encoder:
        return self.encoding.encoder(folder)

    def computed(self, model: Encoder, tables: list[pa.Table]) -> tuple[list[pa.Table], dict[str, Any]]:
        encoded = [model(images, self.encoding.captions) for images in tables]
        return [one.table for one in encoded], encoding.noted(encoded)

    def written(self, folder: Location, tables: list[pa.Table]) -> Iterator[dict[str, Any]]:
        if tables:
            yield tasks.stored(folder, tables)
