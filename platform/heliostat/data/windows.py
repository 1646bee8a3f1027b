"""The numbers of a run's windows as a Ray Dataset, a block each, made shortly before they are fetched.

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
    """Rows {id: 0}, {id: 1}, ... as one task's blocks."""

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
    """Ray Data holds back what takes much memory; so small blocks as these it would all take at once."""

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        if not op.name.startswith("ReadWindows"):  # what Ray calls the task of `Windows`
            return None
        return 0 if self._topology[op].total_enqueued_output_blocks() >= AHEAD else None


def numbered(count: int, context: ray.data.DataContext) -> Any:
    """The Ray Dataset of rows {id: 0} to {id: count - 1}, which come as fast as the next stage takes them. In blocks of one
    row, where the context's `target_max_block_size` is 1.

    It takes no CPU of Ray's, so it is a task of its own: one that was fused with the next stage would do all of its work.
    """
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Ahead])
    return ray.data.read_datasource(Windows(count), num_cpus=0, override_num_blocks=1)
