"""Streaming the run's samples from storage through Ray Data to the workers, in exactly the order that `order` says.

`dataset(plan, ...)` is a Ray Dataset with one block per envelope, in order: a task fetches a window and yields its
envelopes one by one, so each window is read once and the first envelope leaves before the last is cut. `OrderedSplit` hands
block b to rank b mod N. `LaneStream` is the worker's side: it checks that every envelope is the one it expects and cuts
steps from them. A run resumed at step t starts at superstep t div K; nothing before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.train import DataConfig

from heliostat.data.dataset import DataPlan, open_dataset
from heliostat.data.receipt import lane_digest, sample_digests

ENVELOPE = pa.schema([("envelope", pa.int64()), ("digests", pa.large_binary()), ("content", pa.large_binary())])


def dataset(plan: DataPlan, start_step: int, steps: int, concurrency: int) -> Any:
    """The Ray Dataset of all envelopes that steps [start_step, steps) need; at most `concurrency` windows in flight."""
    shape = plan.shape
    first = start_step // shape.superstep * shape.lanes
    last = -(-steps // shape.superstep) * shape.lanes
    per_window = shape.window // shape.envelope
    begin, end = first // per_window, -(-last // per_window)

    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # a block per yielded row
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        windows = ray.data.range(end - begin, override_num_blocks=end - begin)
        pool = ray.data.TaskPoolStrategy(size=concurrency)
        return windows.map_batches(_Fetch(plan, begin, first, last), batch_size=1, compute=pool, zero_copy_batch=True)


@dataclass(frozen=True)
class _Fetch:
    """A map task: window number (from `begin`) -> its envelopes, without those before `first` or from `last` on."""

    plan: DataPlan
    begin: int
    first: int
    last: int

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        data, shape = open_dataset(self.plan), self.plan.shape
        per_window = shape.window // shape.envelope
        for window in batch["id"] + self.begin:
            start, stop = max(self.first, window * per_window), min(self.last, (window + 1) * per_window)
            samples = data.order.locate(np.arange(start * shape.envelope, stop * shape.envelope))
            content = data.read(samples)
            digests = sample_digests(samples, content)
            for i, number in enumerate(range(start, stop)):
                rows = slice(i * shape.envelope, (i + 1) * shape.envelope)
                row = [[number], [digests[rows].tobytes()], [content[rows].tobytes()]]
                yield pa.table([pa.array(v, t) for v, t in zip(row, ENVELOPE.types, strict=True)], schema=ENVELOPE)


class OrderedSplit(DataConfig):
    """Ray Train's default splits equally and ignores the dataset's own options; this one keeps the order, block by block."""

    def configure(self, datasets: dict, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any) -> list[dict]:
        splits = {name: d.streaming_split(world_size, equal=False) for name, d in datasets.items()}
        return [{name: parts[rank] for name, parts in splits.items()} for rank in range(world_size)]


@dataclass(frozen=True)
class StepSamples:
    """A worker's share of a step: contents [n, ...], lanes in order; `lanes` their numbers; `digests` one a lane."""

    content: np.ndarray
    lanes: range
    digests: list[int]


class LaneStream:
    """Cuts steps from the envelopes that one worker receives. `next_step` must be called for consecutive steps."""

    def __init__(self, envelopes: Iterator[dict[str, Any]], plan: DataPlan, rank: int, workers: int, start_step: int) -> None:
        self.envelopes, self.plan = envelopes, plan
        self.lanes = range(rank, plan.shape.lanes, workers)
        self.step = start_step
        self._superstep = -1
        self._held: list[tuple[np.ndarray, np.ndarray]] = []

    def next_step(self) -> StepSamples:
        shape = self.plan.shape
        superstep, inner = divmod(self.step, shape.superstep)
        if superstep != self._superstep:
            self._held = [self._receive(superstep * shape.lanes + lane) for lane in self.lanes]
            self._superstep = superstep
        rows = slice(inner * shape.per_lane, (inner + 1) * shape.per_lane)
        self.step += 1
        return StepSamples(
            np.concatenate([content[rows] for _, content in self._held]),
            self.lanes,
            [lane_digest(digests[rows]) for digests, _ in self._held],
        )

    def _receive(self, expected: int) -> tuple[np.ndarray, np.ndarray]:
        table = next(self.envelopes)
        number = table["envelope"][0].as_py()
        assert number == expected, f"the stream brought envelope {number} where {expected} was due"
        digests = np.frombuffer(table["digests"][0].as_buffer(), dtype="<u8")
        content = np.frombuffer(table["content"][0].as_buffer(), dtype=np.int32)
        return digests, content.reshape(self.plan.shape.envelope, self.plan.sequence_length or -1)


def iterate(shard: Any, plan: DataPlan, rank: int, workers: int, start_step: int) -> LaneStream:
    """The worker's stream over its Ray Train dataset shard, prefetching a superstep ahead."""
    lanes = plan.shape.lanes // workers
    batches = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2 * lanes)
    return LaneStream(iter(batches), plan, rank, workers, start_step)
