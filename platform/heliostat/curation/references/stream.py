"""Computes log-probabilities in a stream (`curation.table_stream`), if actors have GPUs. The table of a block is a row group of a
shard, so the actors share the row groups of a large shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from heliostat.curation.references import computing
from heliostat.curation.references.computing import KIND, ReferenceModel, SourceShard
from heliostat.curation.table_stream import TableStream
from heliostat.data.conversations import REFERENCE_COLUMNS
from heliostat.storage.locations import Location
from heliostat.tasks import shipping, spill
from heliostat.tasks.clusters import Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ReferenceStream(TableStream[SourceShard, "torch.nn.Module"]):
    kind = KIND

    model: ReferenceModel

    def sent(self, number: int, task: Task) -> bytes:
        return json.dumps([number, asdict(task.arguments["shard"])]).encode()

    def received(self, data: bytes) -> tuple[int, SourceShard]:
        task, shard = json.loads(data)
        return task, SourceShard(**shard)

    def groups(self, folder: Location, source: SourceShard) -> Iterator[list[pa.Table]]:
        file = source.read()
        for group in range(file.num_row_groups):
            yield [computing.pairs_of(file, group)]

    def opened(self, folder: Location) -> torch.nn.Module:
        return computing.loaded_once(shipping.here(folder, self.model.shipment), self.model)

    def computed(self, model: torch.nn.Module, tables: list[pa.Table]) -> tuple[list[pa.Table], dict[str, Any]]:
        each = [computing.logprobs(model, rows, self.model) for rows in tables]
        return [pa.table(list(values.T), names=REFERENCE_COLUMNS) for values in each], {}

    def written(self, folder: Location, tables: list[pa.Table]) -> Iterator[dict[str, Any]]:
        for table in tables:
            values = np.stack([table[name].to_numpy() for name in REFERENCE_COLUMNS], 1)
            name = spill.put(folder, values.tobytes(), ".bin")
            yield {"passed": len(table), "values": name, "files": [name]}


def values(record: dict[str, Any]) -> list[str]:
    """Returns the names of a task's temporary files, in the order of the rows. `record`: of the stream or not."""
    return [part["values"] for part in record.get("records", [record]) if "values" in part]
