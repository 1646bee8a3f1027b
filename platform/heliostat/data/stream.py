"""Streams the run's samples from storage through Ray Data to the workers, in exactly the order that `order` defines.

`dataset` makes a Ray Dataset with the order's blocks, in order. A task (`Fetch`) fetches a window and yields its blocks one by
one. So each window is read once, and its first block is sent before its last block is cut. `split` gives block b to rank b mod N.
`LaneStream` runs in the worker. It checks that every block has the expected number, and cuts steps from blocks. A run that
resumes at step t starts at the round that contains t; nothing before it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataIterator, ExecutionResources
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from heliostat.data import device_threads
from heliostat.data.content import Content, join, pack, part, unpack
from heliostat.data.dataset import Bad, DataPlan, open_dataset
from heliostat.data.order import Order
from heliostat.data.receipt import lane_digest, sample_digests
from heliostat.errors import AccessError
from heliostat.storage import wire
from heliostat.storage.records import Format

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces import PhysicalOperator

ENVELOPE = pa.schema(
    [("block", pa.int64()), ("digests", pa.large_binary()), ("content", pa.large_binary()), ("bad", pa.string())]
)
BAD = Format(list[Bad], "list of samples that were replaced")
AHEAD = 64  # maximum number of windows that wait for a fetch; when the stream starts, Ray takes up to some hundred more
COPIES = 4  # copies of a window during its fetch: its chunks, its samples, its blocks in transit, and the blocks before them


@dataclass(frozen=True)
class Fetch:
    """Fetches windows, as a Ray Data map task: takes the index of a window, and yields its blocks in the `wanted` ranges.

    `windows`, `wanted`: ranges [begin, end) of windows and of blocks; `ranks`: (ranks, number of all ranks); yields only the
    blocks of `ranks`. None: yields all blocks.
    """

    plan: DataPlan
    windows: tuple[tuple[int, int], ...]
    wanted: tuple[tuple[int, int], ...]
    replace: bool
    ranks: tuple[tuple[int, ...], int] | None = None

    @property
    def count(self) -> int:
        return sum(end - begin for begin, end in self.windows)

    def window(self, index: int) -> int:
        for begin, end in self.windows:
            if index < end - begin:
                return begin + index
            index -= end - begin
        raise IndexError(index)

    def numbers(self, order: Order, window: int) -> list[int]:
        """Lists the numbers of a window's blocks that this task yields."""
        inside = [n for n in order.blocks(window) if any(first <= n < last for first, last in self.wanted)]
        if self.ranks is None:
            return inside
        ranks, count = self.ranks
        return [n for n in inside if n % self.plan.shape.lanes % count in ranks]

    def indices(self) -> Iterable[int]:
        """Lists the indices of the windows that contain blocks for this task, in order."""
        if self.ranks is None:
            return range(self.count)
        order = open_dataset(self.plan).order
        return (index for index in range(self.count) if self.numbers(order, self.window(index)))

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        if ray.is_initialized():
            AccessError.this_node = ray.get_runtime_context().get_node_id()
        data = open_dataset(self.plan)
        order = data.order
        for window in map(self.window, batch["id"].tolist()):
            numbers = self.numbers(order, window)
            positions = [order.block(n) for n in numbers]
            loaded = data.load(np.concatenate(positions), self.replace)
            digests = sample_digests(loaded.samples, loaded.content)
            start = 0
            for number, inside in zip(numbers, positions, strict=True):
                rows = slice(start, start + len(inside))
                packed = pack(part(loaded.content, rows))
                bad = BAD.encode([b for b in loaded.bad if inside[0] <= b.position <= inside[-1]]).decode()
                row = [pa.array([number]), _one(pa.py_buffer(digests[rows])), _one(packed), pa.array([bad])]
                yield pa.table(row, schema=ENVELOPE)
                start = rows.stop


def _one(data: pa.Buffer) -> pa.Array:
    """Wraps one binary value as an Arrow column, without a copy."""
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, len(data)], np.int64)), data])


def fetch(plan: DataPlan, order: Order, start_step: int, steps: int, replace: bool) -> Fetch:
    """Makes the task that fetches the blocks of steps [start_step, steps). Leaves out blocks that only skipped steps use."""
    edges = [start_step, *sorted(at for at, _ in order.skips if start_step < at < steps), steps]
    wanted, windows = list[tuple[int, int]](), list[tuple[int, int]]()
    for begin, end in pairwise(edges):
        first, last = order.round_of(begin).block, order.round_of(end - 1).block + plan.shape.lanes
        _extend(wanted, first, last)
        _extend(windows, order.window_of(first), order.window_of(last - 1) + 1)
    return Fetch(plan, tuple(windows), tuple(wanted), replace)


def _extend(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
    """Adds [begin, end) to a list of ascending ranges. Merges it with the last range if the two touch or overlap."""
    if ranges and begin <= ranges[-1][1]:
        begin = ranges.pop()[0]
    ranges.append((begin, end))


class Windows(Datasource):
    """Yields the indices of windows as rows {id: 0}, {id: 1}, ..., one block each, shortly before the windows are fetched.

    `numbers` lists the indices, or other values that identify the work, at most `count`.

    `ray.data.range` would make a task and a pickled description of every window when the stream starts. At 1.4 ms and 8 KB per
    window, this takes minutes and gigabytes for a run that reads terabytes. One task takes the same time for any number of
    windows. Ray Data then fetches with few processes, each for many windows.
    """

    def __init__(self, count: int, numbers: Callable[[], Iterable[int | bytes]]) -> None:
        self.count, self.numbers = count, numbers

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self.count

    def get_read_tasks(self, *_: object, **__: object) -> list[ReadTask]:
        numbers = self.numbers

        def blocks() -> Iterator[pa.Table]:
            for number in numbers():
                yield pa.table({"id": [number]})

        return [ReadTask(blocks, BlockMetadata(None, 8 * self.count, None, None))]


class Ahead(BackpressurePolicy):
    """Limits the window indices that wait for a fetch. Ray Data limits only bytes, so without this class it queues the indices
    of all windows at once."""

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        if not op.name.startswith("ReadWindows"):  # Ray's name for the task of `Windows`
            return None
        return 0 if self._topology[op].total_enqueued_output_blocks() >= AHEAD else None


def numbered(count: int, numbers: Callable[[], Iterable[int | bytes]], context: ray.data.DataContext) -> ray.data.Dataset:
    """Makes the Ray Dataset of rows {id: number}, at most `count`.

    The dataset produces rows only as fast as the next stage takes them.

    With `target_max_block_size` 1 in the context, each block has one row. The task requests no CPU, so that Ray doesn't fuse it
    with the next stage. One fused task would do all work of that stage.
    """
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Ahead])
    return ray.data.read_datasource(Windows(count, numbers), num_cpus=0, override_num_blocks=1)


def dataset(
    task: Fetch,
    concurrency: int,
    memory_limit: int,
    sample_bytes: int,
    labels: dict[str, str] | None = None,
    own_cpu: bool = True,
) -> ray.data.Dataset:
    """Makes the Ray Dataset of the task's blocks: each block of the order is one Ray block.

    At most `concurrency` windows are in flight, fewer if `memory_limit` (bytes) doesn't allow that many. `sample_bytes`: mean
    size of a sample; `labels`: only nodes with these Ray labels fetch; `own_cpu`: each fetch task reserves one of Ray's CPUs. If
    `own_cpu` is false, the fetch tasks share the CPUs of other tasks.
    """
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # one block per yielded row
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = labels or None
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=memory_limit)
    # a fetch task may yield a complete window before a block is taken; at Ray's default, 2 blocks, it would pause in between
    context._max_num_blocks_in_streaming_gen_buffer = task.plan.shape.window // task.plan.shape.block
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    fits = max(1, memory_limit // (COPIES * task.plan.shape.window * sample_bytes))
    with ray.data.DataContext.current(context):
        pool = ray.data.TaskPoolStrategy(size=min(concurrency, fits))
        # one byte of memory, because Ray would fuse tasks that request the same as the tasks before them (`numbered`)
        cpus, memory = (None, None) if own_cpu else (0, 1)
        return numbered(task.count, task.indices, context).map_batches(
            task, batch_size=1, compute=pool, zero_copy_batch=True, num_cpus=cpus, memory=memory
        )


def split(data: ray.data.Dataset, workers: int) -> list[DataIterator]:
    """Splits the stream by blocks into one part for each worker, in order.

    The stream runs in its own actor on this node; `end` stops it. Ray Train could also split the stream, but it needs one more
    process, and can start only after the workers.
    """
    return data.streaming_split(workers, equal=False)


def end(parts: list[DataIterator]) -> None:
    """Ends the stream and its fetch tasks."""
    ray.kill(parts[0]._coord_actor)  # type: ignore[attr-defined]


@wire.travels
@dataclass(frozen=True)
class StepSamples:
    """Holds a worker's samples of a step.

    `content`: the samples, ordered by virtual rank; `lanes`: the worker's virtual ranks; `digests`: one for each virtual rank;
    `bad`: the samples that were replaced.
    """

    content: Content
    lanes: range
    digests: list[int]
    bad: list[Bad]


class LaneStream:
    """Cuts steps from the blocks that one worker receives. Each call of `next_step` returns the samples of the following step."""

    def __init__(
        self, blocks: Iterator[pa.Table], plan: DataPlan, order: Order, rank: int, workers: int, start_step: int
    ) -> None:
        self.blocks, self.plan, self.order = blocks, plan, order
        self.lanes = range(rank, plan.shape.lanes, workers)
        self.step = start_step
        self._round = -1
        self._blocks: list[tuple[np.ndarray, Content, dict[int, Bad]]] = []

    def next_step(self) -> StepSamples:
        shape, inside = self.plan.shape, self.order.round_of(self.step)
        if inside.first_step != self._round:
            self._blocks = [self._receive(inside.block + lane) for lane in self.lanes]
            self._round = inside.first_step
        inner = self.order.data_step(self.step) - inside.first_step
        rows = slice(inner * shape.per_lane, (inner + 1) * shape.per_lane)
        self.step += 1
        bad = [b for _, _, replaced in self._blocks for at, b in replaced.items() if rows.start <= at < rows.stop]
        return StepSamples(
            join([part(content, rows) for _, content, _ in self._blocks]),
            self.lanes,
            [lane_digest(digests[rows]) for digests, _, _ in self._blocks],
            bad,
        )

    def _receive(self, expected: int) -> tuple[np.ndarray, Content, dict[int, Bad]]:
        table = next(self.blocks)
        number = table["block"][0].as_py()
        assert number == expected, f"the stream delivered block {number}, expected block {expected}"
        digests = np.frombuffer(table["digests"][0].as_buffer(), dtype="<u8")
        content = unpack(table["content"][0].as_buffer(), len(digests), bool(self.plan.sequence_length))
        first = int(self.order.block(number)[0])
        return digests, content, {b.position - first: b for b in BAD.parse(table["bad"][0].as_py().encode(), "a block")}


def iterate(part: DataIterator, plan: DataPlan, order: Order, rank: int, workers: int, start_step: int) -> LaneStream:
    """Returns a worker's stream of samples, cut from the worker's blocks in `part`. From this call on, the stream prefetches
    one round."""
    lanes = plan.shape.lanes // workers
    batches = part.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2 * lanes)
    return LaneStream(begun(iter(batches)), plan, order, rank, workers, start_step)


def begun(blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Fetches the first block in a thread while the caller does other work; then yields this block, and the blocks after it."""
    first: Future[pa.Table] = Future()

    def fetch() -> None:
        try:
            first.set_result(next(blocks))
        except Exception as e:  # noqa: BLE001 (raised where the block is due)
            first.set_exception(e)

    device_threads.thread(fetch, "first-block")

    def rest() -> Iterator[pa.Table]:
        yield first.result()
        yield from blocks

    return rest()
