"""Yields the numbers of a run's windows as a Ray Dataset, one block each, shortly before they are fetched.

`ray.data.range` would make a task and a pickled description of every window when the stream starts: 1.4 ms and 8 KB a window, so
minutes and gigabytes where a run reads terabytes. One task that yields them takes the same time whatever their number, and
Ray Data then fetches with few processes, each for many windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

AHEAD = 64  # windows that are numbered and wait to be fetched; Ray takes up to some hundred more in one go when it starts


class Windows(Datasource):
    """Yields the rows {id: 0}, {id: 1}, ... as blocks of one task."""

    def __init__(self, count: int) -> None:
        self.count = count

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self.count

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        count = self.count

        def blocks() -> Iterator[pa.Table]:
            for number in range(count):
                yield pa.table({"id": [number]})

        return [ReadTask(blocks, BlockMetadata(count, 8 * count, None, None))]


class Ahead(BackpressurePolicy):
    """Limits the numbered windows that wait to be fetched: Ray Data limits only bytes, and would take all these small blocks."""

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        if not op.name.startswith("ReadWindows"):  # what Ray calls the task of `Windows`
            return None
        return 0 if self._topology[op].total_enqueued_output_blocks() >= AHEAD else None


def numbered(count: int, context: ray.data.DataContext) -> Any:
    """Makes the Ray Dataset of rows {id: 0} to {id: count - 1}, which are produced as fast as the next stage takes them.

    With the context's `target_max_block_size` of 1, each block has one row. The task takes no CPU of Ray's, so it stays a task of
    its own: one that was fused with the next stage would do all of its work.
    """
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Ahead])
    return ray.data.read_datasource(Windows(count), num_cpus=0, override_num_blocks=1)
