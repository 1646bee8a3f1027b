"""Copies a worker's part of the training state into the memory of its node and of another node, and reads the copies back.

First the state is copied into this process's memory. As with a save, this happens during the next forward and backward pass, so
only the next optimizer step waits for the copy. On a GPU, the copy is queued on a separate stream, into pinned memory. The
optimizer's kernels wait for the copy; the host doesn't.

Then a separate thread sends the copy to the keepers (`training.memory_keeper`) in pieces, several at a time. A worker that dies
or is late leaves a generation incomplete, and an incomplete generation isn't used. If a worker's copy fails, or if training waits
too long for the copy, all workers agree to make no more copies, because generations without that worker's part would be useless.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from dataclasses import astuple
from typing import TypeVar

import numpy as np
import ray
import torch
import torch.distributed as dist

from heliostat.checkpoint import flat_copy
from heliostat.checkpoint.agreement import agreed, together
from heliostat.checkpoint.flat_copy import CopiedBytes, FlatRange
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.data import device_threads
from heliostat.data.device_streams import CopyStream
from heliostat.errors import TrainingError
from heliostat.storage import wire
from heliostat.text import brief
from heliostat.training.memory_keeper import CopyFacts, CopySource, Layout, MemoryPlan, Sum, generation, summed

log = logging.getLogger(__name__)

PIECE = 32 << 20  # bytes per piece
IN_FLIGHT = 4  # pieces that are sent at the same time
ANSWER_S = 60.0  # seconds for a keeper to answer
WAIT_S = 60.0  # longest time that training waits for one copy
POLL_S = 0.2
T = TypeVar("T")
OFF = "checkpoint.memory_every: in-memory checkpoints are off"


class MemoryCopies:
    def __init__(self, plan: MemoryPlan, limit: int, rank: int, world: int, notice: Callable[[str], None]) -> None:
        """Prepares the copies of a worker. `limit`: bytes per node for all copies. `notice`: reports to the user that copies are
        off."""
        self.blocked_s = 0.0
        self._plan, self._limit, self._rank, self._world, self._notice = plan, limit, rank, world, notice
        self._thread = device_threads.pool(1, "memory")
        self._pending: Future[None] | None = None
        self._copied, self._ended, self._late = threading.Event(), threading.Event(), threading.Event()
        self._copied.set()
        self._buffer: torch.Tensor | None = None
        self._stream = CopyStream()
        self._off, self._kept = False, 0
        self._failed = ""  # why this worker's last copy failed

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes each optimizer step wait until the copy in flight has read the state, because the step changes the state."""
        optimizer.register_step_pre_hook(lambda *_: self.before_change())

    def before_change(self) -> None:
        """Waits until a change of the training state can't affect the copy in flight.

        On a GPU, the host waits only until the copies are queued. Kernels that are queued later wait until the copies are done.
        """
        self._until(lambda: self._copied.wait(POLL_S))
        self._stream.hold_back()

    def keep(self, facts: CopyFacts, own: object, state: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> None:
        """Copies the state after a step. All workers call `wait` and then this method, at the same steps.

        `facts`: the same on all workers. `own`: the rest of this worker's state, which the thread encodes.
        """
        if self._off or self._agree_off(group):
            return
        ranges = flat_copy.layout(state)
        if self._buffer is None and not self._begin(flat_copy.size(ranges), state, group):
            return
        # the forward pass may change buffers, so they are copied now, on their device
        state = {n: t if isinstance(t, FlatShard) else t.detach().clone() for n, t in state.items()}
        self._stream.mark(state)
        self._copied.clear()
        self._pending = self._thread.submit(self._copy, facts, own, state, ranges)

    def wait(self) -> None:
        """Waits until the copy in flight has arrived.

        If the copy fails, records the reason. At the next `keep`, the workers then agree to make no more copies.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        until = time.monotonic() + WAIT_S
        self._until(lambda: bool(futures.wait([pending], POLL_S).done) or time.monotonic() > until)
        if not pending.done():
            self._late.set()
            self._failed = f"training waited {WAIT_S:.0f} s for an in-memory checkpoint. Raise checkpoint.memory_every"
        elif error := pending.exception():
            self._failed = brief(error)
        else:
            self._kept += 1
        if self._failed:
            log.warning("worker %d: an in-memory checkpoint failed: %s", self._rank, self._failed)

    def _agree_off(self, group: dist.ProcessGroup) -> bool:
        """Returns whether any worker's copy has failed. Reports the first failure to the user. All workers call this method
        together."""
        failed = [(rank, why) for rank, why in enumerate(together(group, lambda: self._failed)) if why]
        if not failed:
            return False
        self._off = True
        if self._rank == 0:
            (rank, why), more = failed[0], f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            self._notice(f"{OFF} until the workers start again. {self._kept} copies were made before. Worker {rank}{more}: {why}")
        return True

    def end(self) -> None:
        """Abandons the copy in flight, and waits for the thread to end.

        Otherwise the thread would write into the next attempt's generations.
        """
        self._ended.set()
        self._thread.shutdown(wait=True)

    def _begin(self, size: int, state: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> bool:
        """Prepares for copies of `size` bytes.

        Returns whether the copies of all workers fit within the limit on every node. All workers call this method together.
        """
        keepers = self._plan.keepers[self._rank]
        agreed(group, lambda: _need([k.reserve.remote(self._rank, size) for k in keepers]))
        needs = together(group, lambda: _need([k.need.remote() for k in keepers]))
        need = max((n for n in needs if n is not None), default=0)
        why = "the actor that stores a node's in-memory checkpoints doesn't answer" if None in needs else ""
        if need > self._limit:
            limit = f"checkpoint.memory_limit is {self._limit / 2**20:,.1f} MiB"
            why = f"copies need {need / 2**20:,.1f} MiB on a node, and {limit}. Raise this limit, or train on more workers"
        if why:
            self._off = True
            if self._rank == 0:
                self._notice(f"{OFF}: {why}")
            return False
        self._buffer = flat_copy.as_buffer(size, any(t.is_cuda for t in state.values()))
        return True

    def _until(self, done: Callable[[], bool]) -> None:
        started = time.perf_counter()
        while not done():
            pass
        self.blocked_s += time.perf_counter() - started

    def _copy(self, facts: CopyFacts, own: object, state: dict[str, torch.Tensor], ranges: list[FlatRange]) -> None:
        assert self._buffer is not None
        id = generation(self._plan.attempt, facts.step)
        try:
            with self._stream.queue():
                flat_copy.pack(state, ranges, self._buffer)
        finally:
            self._copied.set()
        self._stream.wait()
        data = self._buffer.numpy()
        keepers = self._plan.keepers[self._rank]
        self._answers([keeper.open.remote(id, self._rank, len(data)) for keeper in keepers])
        sums, in_flight = list[Sum](), deque[list["ray.ObjectRef[None]"]]()
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            sums.append(summed(piece, start))
            sent = ray.put(piece)
            in_flight.append([keeper.write.remote(id, self._rank, start, sent) for keeper in keepers])
            if len(in_flight) == IN_FLIGHT:
                self._answers(in_flight.popleft())
        while in_flight:
            self._answers(in_flight.popleft())
        layout = [astuple(r) for r in ranges]
        self._answers([keeper.seal.remote(id, self._rank, sums, facts, layout, wire.pack(own)) for keeper in keepers])

    def _answers(self, calls: list[ray.ObjectRef[None]]) -> None:
        """Waits for the answers of keepers (the actors that store in-memory checkpoints).

        Raises TimeoutError if a keeper doesn't answer within ANSWER_S seconds, or if the attempt has ended.
        """
        until = time.monotonic() + ANSWER_S
        while ray.wait(calls, num_returns=len(calls), timeout=POLL_S)[1]:
            if self._ended.is_set() or self._late.is_set() or time.monotonic() > until:
                raise TimeoutError(f"no answer within {ANSWER_S:.0f} s from the actor that stores a node's in-memory checkpoints")
        ray.get(calls)


def _need(calls: list[ray.ObjectRef[int]]) -> int | None:
    """Returns the largest of the keepers' answers, in bytes. Returns None if a keeper doesn't answer."""
    try:
        return max(answer or 0 for answer in ray.get(calls, timeout=ANSWER_S))
    except ray.exceptions.RayError:
        return None


def restore(
    source: CopySource, state: Mapping[str, torch.Tensor], node: str, rank: int, same: bool, progressed: Callable[[], None]
) -> tuple[CopyFacts, list[bytes]]:
    """Reads this worker's slices of a generation into the state. Returns the facts that all copies share, and on rank 0 each
    worker's own bytes.

    `same`: whether this worker needs exactly the slices that the copy of its own rank contains. Raises TrainingError if a keeper
    doesn't answer.
    """
    near = {old: min(holders, key=lambda h: h[0] != node)[1] for old, holders in source.holders.items()}
    own: dict[int, bytes] = _ask({old: near[old].own.remote(source.id, old) for old in sorted(near) if rank == 0})
    needed = [rank] if same else sorted(near)
    described: dict[int, tuple[CopyFacts, Layout]] = _ask({old: near[old].described.remote(source.id, old) for old in needed})
    layouts = {old: [FlatRange(*r) for r in layout] for old, (_, layout) in described.items()}
    wanted = flat_copy.layout(state)
    buffer = flat_copy.as_buffer(flat_copy.size(wanted), False)
    into = buffer.numpy()
    for old, batch in _batches(flat_copy.pieces(layouts, wanted)):
        ranges = [(p.source, p.source + p.size) for p in batch]
        answer: dict[int, np.ndarray] = _ask({old: near[old].read.remote(source.id, old, ranges)})
        _spread(answer[old], batch, into)
        progressed()
    flat_copy.unpack(state, wanted, buffer)
    return described[needed[0]][0], list(own.values())


def _batches(pieces: list[CopiedBytes]) -> Iterator[tuple[int, list[CopiedBytes]]]:
    """Groups the pieces of each rank into batches of at most PIECE bytes."""
    for old in sorted({p.rank for p in pieces}):
        batch, total = list[CopiedBytes](), 0
        for whole in (p for p in pieces if p.rank == old):
            for first in range(0, whole.size, PIECE):
                part = CopiedBytes(old, whole.source + first, whole.target + first, min(PIECE, whole.size - first))
                if batch and total + part.size > PIECE:
                    yield old, batch
                    batch, total = [], 0
                batch.append(part)
                total += part.size
        if batch:
            yield old, batch


def _spread(data: np.ndarray, batch: list[CopiedBytes], into: np.ndarray) -> None:
    at = 0
    for piece in batch:
        into[piece.target : piece.target + piece.size] = data[at : at + piece.size]
        at += piece.size


def _ask(calls: dict[int, ray.ObjectRef[T]]) -> dict[int, T]:
    try:
        return dict(zip(calls, ray.get(list(calls.values()), timeout=ANSWER_S), strict=True))
    except ray.exceptions.RayError as e:
        raise TrainingError(f"can't read the in-memory checkpoints: {type(e).__name__}: {brief(e)}") from e
