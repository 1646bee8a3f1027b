"""Runs tasks that need models as one Ray Data pipeline, so that GPUs compute while CPUs read, filter, and write.

    queue of tasks -> read (CPUs) -> score (actors with GPUs) -> write (CPUs) -> records

The operators are those of a `StreamForm`: segments of stages (`streamed`), or tables (`table_stream`), for a reference's
log-probabilities (`references.stream`) or for encoders of images (`images.stream`).

Documents pass through Ray's object store. Ray Data stops reading when the blocks that wait for a GPU use their share of the
object store (backpressure by bytes), and starts actors up to the number of GPUs. The driver receives only records. When the
driver has the records of all blocks of a task, it writes the task's record.

The stream tries each task once. A document that ends a process, or a lost node, ends the tasks whose blocks were there. The
tasks that the stream doesn't finish are left to recorded tasks (`tasks.crew`), which find and leave out such documents.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, DataIterator, Dataset
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning
from ray.util.queue import Full, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.curation.streamed import KIND, StreamForm
from heliostat.data import stream
from heliostat.errors import ConfigError
from heliostat.tasks import care, shipping
from heliostat.tasks.flow import BATCH, Flow, Task
from heliostat.tasks.pool import PLACE_S
from heliostat.tasks.ray_cluster import RayCluster

FEED = 64  # tasks that wait in the queue
BLOCKS_LOST = 1000  # blocks that may end with their process or node, before Ray Data ends the stream
TASKS_FAILED, SHARE = 32, 10  # the stream ends if more than TASKS_FAILED tasks fail, and more than one in SHARE
WRITERS, UNWRITTEN = 16, 256  # threads that write records; records that wait for them
STUCK_S = 3600.0  # seconds without any block from any part, before Ray Data ends the stream
LOOK_S, WAIT_S = 2.0, 0.2
LOST = "a process or node of these tasks ended"
log = logging.getLogger(__name__)
Finished = tuple[int, Task, dict[str, Any] | None]
"""A task's number, the task, and its record; None if recorded tasks must run this task."""


def dataset(flow: Flow, plan: StreamForm, feed: Queue, lacking: Queue) -> Dataset:
    """Makes the Ray Dataset, whose rows are blocks without documents (schema BLOCK). `feed` has the tasks, and `lacking` gets the
    files that nodes lack."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # one block per yielded row
    context.execution_options.preserve_order = False
    context.execution_options.label_selector = flow.labels or None
    context.max_errored_blocks = BLOCKS_LOST
    context.execution_no_progress_timeout_s = STUCK_S
    context.wait_for_min_actors_s = int(PLACE_S)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    read, scorer, arguments, write = plan.operators(flow.work.spill, lacking)
    once: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    task = once | {"num_cpus": 1, "max_retries": 0, "memory": flow.memory_each()}
    actor = once | {"num_cpus": 0, "num_gpus": plan.gpus_each, "max_restarts": -1, "max_task_retries": 0}
    with DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # Ray 2.60 has no other way to limit retries
        tasks = stream.numbered(1 << 20, partial(taken, feed), context)
        blocks = tasks.map_batches(read, **task | {"memory": flow.memory_each(reads=plan.kind == "read")})
        pool = ActorPoolStrategy(min_size=1, max_size=plan.gpus)
        scored = blocks.map_batches(scorer, fn_constructor_args=arguments, compute=pool, **actor)
        return scored.map_batches(write, **task)


def taken(feed: Queue) -> Iterator[bytes]:
    """Yields the tasks from a queue of (number, task). Ends at the task None.

    If this generator's node is lost, Ray starts the generator again, and ignores as many items as the stream already has. So the
    generator first yields nothing instead of these items. The end stays in the queue, for a generator that starts again later.
    """
    count = 0
    while True:
        order, item = feed.get()
        yield from [b""] * (order - count)
        if item is None:
            feed.put((order, None))
            return
        yield item
        count = order + 1


def run(flow: Flow, plan: StreamForm, tasks: Iterator[Task]) -> Iterator[Finished]:
    """Runs tasks in a stream. Yields each task with its record, or with None if recorded tasks must run it.

    `tasks`: the recorded tasks for the first segment. Recorded tasks also continue the work that they have begun.
    """
    running: RunningStream | None = None
    try:
        for number, task, record, begun in _looked_up(flow, plan, tasks):
            if record is not None:
                count(flow, flow.kept, record)
                yield number, task, record
            elif begun:
                yield number, task, None
            elif running and running.reason:
                running.waiting[number] = task
            else:
                running = running or RunningStream(flow, plan)
                while not (started := running.start(number, task)) and not running.reason:
                    yield from running.finished(WAIT_S)
                if not started:
                    running.waiting[number] = task
                yield from running.finished(0)
        if running is not None:
            yield from running.rest()
    finally:
        if running is not None:
            running.end()


def _looked_up(flow: Flow, plan: StreamForm, tasks: Iterator[Task]) -> Iterator[tuple[int, Task, dict[str, Any] | None, bool]]:
    """Yields for each task: its number, the task, its record in the stream, and whether recorded tasks have begun it."""
    kind, number, whole = plan.kind, 0, False
    while not whole:
        batch = list(islice(tasks, BATCH))
        whole = len(batch) < BATCH
        known = flow.work.found(KIND, [plan.key(task.key) for task in batch])
        begun = flow.work.found(kind, [name for task in batch for name in (task.key, task.before) if name])
        looked = [(task, known.get(plan.key(task.key)), task.key in begun or task.before in begun) for task in batch]
        todo = [task.bytes for task, record, other in looked if record is None and not other]
        flow.progress.found(KIND, list(known.values()), todo, whole)
        for task, record, other in looked:
            yield number, task, record, other
            number += 1


def count(flow: Flow, counts: dict[str, int], record: dict[str, Any]) -> None:
    """Counts a task's record in the flow, as if recorded tasks had run its segments."""
    for part in record["records"]:
        flow._count(counts, part["kind"], part)


def combined(blocks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Combines the records of all blocks of a task into the task's record, in the order of the blocks."""
    records = [part for one in sorted(blocks, key=lambda one: one["block"]) for part in json.loads(one["records"])]
    runs = [run for part in records for run in part["runs"]]
    return {"records": [part | {"runs": []} for part in records], "runs": runs,
            "files": [name for part in records for name in part["files"]]}  # fmt: skip


class RunningStream:
    """Runs the stream, in Ray Data's processes, and receives the records of its tasks.

    `reason`: why the stream takes no more tasks; "" while it takes tasks. `waiting`: the tasks that aren't finished, by number,
    including those that the stream never took.
    """

    def __init__(self, flow: Flow, plan: StreamForm) -> None:
        if not isinstance(flow.cluster, RayCluster):
            raise ConfigError(f"--simulate: {plan.kind}: models in actors aren't supported. Remove --simulate, or these models")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here}
        self.flow, self.plan, self.reason = flow, plan, ""
        self.feed, self.lacking = Queue(FEED, options), Queue(0, options)
        self.waiting: dict[int, Task] = {}
        self.blocks: dict[int, dict[int, dict[str, Any]]] = {}
        self.lasts: dict[int, int] = {}
        self.started = self.done = self.failed = 0
        self.looked = self.had_gpus = time.monotonic()
        self.writers, self.writes = ThreadPoolExecutor(WRITERS), deque[Future[None]]()
        self.parts = stream.split(dataset(flow, plan, self.feed, self.lacking), 1)
        self.received: queue.SimpleQueue[list[dict[str, Any]] | Exception | None] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(self.parts[0], self.received), name="stream", daemon=True).start()

    def start(self, number: int, task: Task) -> bool:
        """Puts a task into the queue; returns whether the queue had room."""
        if started := self._put((self.started, self.plan.sent(number, task))):
            self.waiting[number] = task
            self.started += 1
        return started

    def finished(self, wait_s: float) -> Iterator[Finished]:
        """Waits up to `wait_s` seconds for blocks. Yields the tasks that are complete or that failed."""
        self._look()
        try:
            rows = self.received.get(timeout=wait_s) if wait_s else self.received.get_nowait()
        except queue.Empty:
            return
        if rows is None or isinstance(rows, Exception):
            self.reason = self.reason or (care.last_line(rows) if rows else LOST)
            return
        for row in rows:
            yield from self._take(row)

    def rest(self) -> Iterator[Finished]:
        """Waits for all tasks. Yields the tasks that are complete, then those that the stream lost or didn't finish."""
        while not self.reason and not self._put((self.started, None)):
            yield from self.finished(WAIT_S)
        while not self.reason:
            yield from self.finished(WAIT_S)
        while self.writes:
            self.writes.popleft().result()
        if self.waiting or self.failed:
            log.warning(
                "Ray Data finished %d tasks, but not %d others (%s). Running these as recorded tasks",
                self.done, self.failed + len(self.waiting), self.reason if self.waiting else "their errors follow",
            )  # fmt: skip
        yield from ((number, task, None) for number, task in self.waiting.items())

    def end(self) -> None:
        """Ends the stream's processes, and waits for the records that threads write."""
        stream.end(self.parts)
        self.feed.shutdown(force=True)
        self.lacking.shutdown(force=True)
        self.writers.shutdown()

    def _put(self, item: tuple[int, bytes | None]) -> bool:
        try:
            self.feed.put_nowait(item)
        except Full:
            return False
        except RayError as e:
            self.reason = self.reason or care.last_line(e)
            return False
        return True

    def _take(self, row: dict[str, Any]) -> Iterator[Finished]:
        """Adds a block to its task. If the task is complete, starts to write the task's record, and yields the task."""
        number = row["task"]
        if (task := self.waiting.get(number)) is None:  # failed before
            return
        if row["error"] is not None:
            error = json.loads(row["error"])
            self.failed += 1
            if error["final"] or self.failed > max(TASKS_FAILED, self.done // SHARE):
                self.reason = self.reason or error["message"]
            yield number, self._drop(number), None
            return
        blocks = self.blocks.setdefault(number, {})
        blocks[row["block"]] = row
        if row["last"]:
            self.lasts[number] = row["block"]
        if len(blocks) == self.lasts.get(number, -1) + 1:
            record = combined(blocks.values())
            self.done += 1
            self._write(self.plan.key(task.key), record)
            count(self.flow, self.flow.done, record)
            self.flow.progress.done(KIND, record, task.bytes)
            yield number, self._drop(number), record

    def _drop(self, number: int) -> Task:
        self.blocks.pop(number, None)
        self.lasts.pop(number, None)
        return self.waiting.pop(number)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        while len(self.writes) >= UNWRITTEN or (self.writes and self.writes[0].done()):
            self.writes.popleft().result()
        self.writes.append(self.writers.submit(self.flow.work.finish, KIND, name, record))

    def _look(self) -> None:
        """Copies files that nodes lack to the work folder. Ends the stream if no node has had the GPUs of an actor for PLACE_S
        seconds."""
        now = time.monotonic()
        if now - self.looked < LOOK_S:
            return
        self.looked = now
        while self.writes and self.writes[0].done():  # raises the error of a file that can't be copied
            self.writes.popleft().result()
        if self.flow.devices(self.plan.gpus_each) >= self.plan.gpus_each:
            self.had_gpus = now
        elif now - self.had_gpus > PLACE_S:
            self.reason = self.reason or f"no node with the GPUs of an actor for {PLACE_S:.0f} s"
        try:
            lacking = self.lacking.get_nowait_batch(self.lacking.qsize())
        except RayError as e:
            self.reason = self.reason or care.last_line(e)
            return
        self.writes += [self.writers.submit(shipping.offer, self.flow.work.spill, shipment) for shipment in lacking]


def _receive(part: DataIterator, received: queue.SimpleQueue[list[dict[str, Any]] | Exception | None]) -> None:
    """Receives the stream's blocks in a thread: puts their rows into a queue; at the end, None or the error."""
    try:
        for rows in part.iter_batches(batch_size=1, batch_format="pyarrow"):
            assert isinstance(rows, pa.Table)
            received.put(rows.select(["task", "block", "last", "records", "error"]).to_pylist())
        received.put(None)
    except Exception as e:  # noqa: BLE001 - raised or judged where the rows are taken
        received.put(e)
