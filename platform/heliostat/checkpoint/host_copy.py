"""Copies a worker's slices to host memory beside the training: into one flat buffer, pinned and by a stream of its own for GPUs.

The copies are views of the buffer, which is kept from save to save: fresh memory costs more than the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from heliostat.checkpoint.flat_shard import FlatShard

ALIGNMENT = 64  # bytes


class CopyStream:
    """Queues copies from a GPU on a stream of its own, after what another thread has queued for training; else does nothing."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._ready: Any = None
        self._done: Any = None

    def mark(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Marks the moment whose state is to be copied; called in the thread that trains, behind what it has queued on a GPU."""
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        if device is None:
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._ready = torch.cuda.current_stream(device).record_event()

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Queues the copies that are made inside, as of the last `mark`; `wait` waits for them."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._ready)
            yield
            self._done = self._stream.record_event()

    def hold_back(self) -> None:
        """Lets what is queued next on the GPU wait until the queued copies are done; the calling thread does not wait."""
        if self._done is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)

    def wait(self) -> None:
        """Waits until the queued copies are in host memory."""
        if self._done is not None:
            self._done.synchronize()


class HostCopy(CopyStream):
    """Copies slices in a thread; `views`: the last copies, by name, until the next `copy`."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, torch.Tensor] = {}
        self._layout: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def copy(self, shards: Mapping[str, FlatShard], copied: Callable[[], None]) -> dict[str, FlatShard]:
        """Copies the slices as of the last `mark`: on a GPU it only queues that, and `wait` waits. Calls `copied` for each."""
        self._make_room(shards)
        ordered = sorted(shards, key=lambda n: not shards[n].is_cuda)  # the queue fills while what is on the host is copied
        on_gpu = [n for n in ordered if shards[n].is_cuda]
        if on_gpu:
            with self.queue():
                for name in on_gpu:
                    self.views[name].copy_(shards[name].local, non_blocking=True)
                    copied()
        for name in ordered[len(on_gpu) :]:
            self.views[name].copy_(shards[name].local)
            copied()
        return {n: s.holding(self.views[n]) for n, s in shards.items()}

    def _make_room(self, shards: Mapping[str, FlatShard]) -> None:
        layout = {n: (s.local.shape, s.dtype) for n, s in shards.items()}
        if layout == self._layout:
            return
        self.views.clear()  # the old buffer goes before there is a new one
        offsets, end = {}, 0
        for name, shard in shards.items():
            offsets[name] = end
            end += -(-shard.local.numel() * shard.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        buffer = torch.empty(end, dtype=torch.uint8, pin_memory=any(s.is_cuda for s in shards.values()))
        for name, shard in shards.items():
            size = shard.local.numel() * shard.dtype.itemsize
            self.views[name] = buffer[offsets[name] : offsets[name] + size].view(shard.dtype).view(shard.local.shape)
        self._layout = layout
