"""Copies a rank's slices of the training state into a flat buffer in host memory, from which other ranks can get their slices.

All slices are ranges of flat tensors (`flat_shard`). So a rank finds its slices even in copies from a run with another world
size. The copies of a save (`HostCopy`) are views of a buffer. Every save uses the same buffer again, because allocating new
memory takes longer than copying. For GPUs the buffer is pinned, and a separate stream fills it during training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from heliostat.checkpoint.checksums import as_bytes
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.data.device_streams import CopyStream
from heliostat.errors import TrainingError

ALIGNED = 64  # bytes, so that each slice of a buffer can be viewed in its dtype


@dataclass(frozen=True)
class FlatRange:
    """Describes a slice [start, start + numel) of a flat tensor in a buffer, at byte `offset`. `itemsize`: bytes per element."""

    name: str
    start: int
    numel: int
    itemsize: int
    offset: int

    @property
    def size(self) -> int:
        return self.numel * self.itemsize


EMPTY = FlatRange("", 0, 0, 1, 0)


@dataclass(frozen=True)
class CopiedBytes:
    """Describes `size` bytes at `source` in an old rank's copy, which belong at `target` in a new rank's buffer."""

    rank: int
    source: int
    target: int
    size: int


def layout(state: Mapping[str, torch.Tensor]) -> list[FlatRange]:
    """Assigns each slice a place in a buffer. The slices are sorted by name."""
    ranges, offset = list[FlatRange](), 0
    for name in sorted(state):
        local, start = _local(state[name])
        if local.numel():
            ranges.append(FlatRange(name, start, local.numel(), local.element_size(), offset))
            offset += -(-ranges[-1].size // ALIGNED) * ALIGNED
    return ranges


def size(ranges: Iterable[FlatRange]) -> int:
    """Computes the size in bytes of a buffer for a layout."""
    return max((-(-(r.offset + r.size) // ALIGNED) * ALIGNED for r in ranges), default=0)


def pack(
    state: Mapping[str, torch.Tensor],
    ranges: Iterable[FlatRange],
    buffer: torch.Tensor,
    copied: Callable[[], None] = lambda: None,
) -> None:
    """Copies the slices to their places in a flat uint8 buffer on the CPU. Calls `copied` after each slice.

    Copies from a GPU are only queued, on the current stream. GPU copies are queued first, so that the GPU copies its slices while
    the CPU copies the other slices.
    """
    for r in sorted(ranges, key=lambda r: not state[r.name].is_cuda):
        local, _ = _local(state[r.name])
        buffer[r.offset : r.offset + r.size].view(local.dtype).copy_(local.reshape(-1), non_blocking=True)
        copied()


def unpack(state: Mapping[str, torch.Tensor], ranges: Iterable[FlatRange], buffer: torch.Tensor) -> None:
    """Copies the slices from their places in a buffer into the state."""
    for r in ranges:
        local, _ = _local(state[r.name])
        local.copy_(_view(buffer, r, local))


def pieces(copies: Mapping[int, list[FlatRange]], wanted: list[FlatRange]) -> list[CopiedBytes]:
    """Finds each wanted byte in the copy of one of the ranks, and joins adjacent bytes into pieces.

    Raises TrainingError if a wanted byte is in no copy.
    """
    by_name: dict[str, list[tuple[int, int, int, FlatRange]]] = {}
    for rank, ranges in copies.items():
        for r in ranges:
            by_name.setdefault(r.name, []).append((r.start, r.numel, rank, r))
    copied = list[CopiedBytes]()
    for want in wanted:
        at, end = want.start, want.start + want.numel
        for start, numel, rank, r in sorted(by_name.get(want.name, []), key=lambda c: c[:3]):
            if start <= at < min(start + numel, end) and r.itemsize == want.itemsize:
                stop = min(start + numel, end)
                source, target = r.offset + (at - start) * r.itemsize, want.offset + (at - want.start) * r.itemsize
                _append(copied, CopiedBytes(rank, source, target, (stop - at) * r.itemsize))
                at = stop
        if at < end:
            raise TrainingError(f"the in-memory checkpoints lack elements {at} to {end} of {want.name!r}")
    return copied


def _append(copied: list[CopiedBytes], piece: CopiedBytes) -> None:
    """Appends a piece; merges it with the previous piece if there is only padding between the two pieces, in both buffers."""
    if copied and copied[-1].rank == piece.rank:
        last = copied[-1]
        gap = piece.source - last.source - last.size
        if gap == piece.target - last.target - last.size and 0 <= gap < ALIGNED:
            copied[-1] = CopiedBytes(last.rank, last.source, last.target, last.size + gap + piece.size)
            return
    copied.append(piece)


def _local(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (tensor.local, tensor.start) if isinstance(tensor, FlatShard) else (tensor.detach(), 0)


def _view(buffer: torch.Tensor, place: FlatRange, like: torch.Tensor) -> torch.Tensor:
    return buffer[place.offset : place.offset + place.size].view(like.dtype).view(like.shape)


def as_buffer(nbytes: int, pinned: bool) -> torch.Tensor:
    return as_bytes(torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned))


class HostCopy(CopyStream):
    """Copies slices in a thread. `views`: the copies by name, valid until the next `copy`."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, torch.Tensor] = {}
        self._ranges: list[FlatRange] = []
        self._buffer = as_buffer(0, False)

    def copy(self, shards: Mapping[str, FlatShard], copied: Callable[[], None]) -> dict[str, FlatShard]:
        """Copies the slices as they were at the last `mark`, and calls `copied` after each slice.

        On a GPU, the copies are only queued: call `wait` before you use the copies.
        """
        ranges = layout(shards)
        if ranges != self._ranges:
            self.views, self._buffer = {}, as_buffer(0, False)  # frees the old buffer before it allocates a new one
            self._buffer = as_buffer(size(ranges), any(s.is_cuda for s in shards.values()))
            self._ranges = ranges
        places = {r.name: r for r in ranges}
        self.views = {n: _view(self._buffer, places.get(n, EMPTY), s.local) for n, s in shards.items()}
        with self.queue():
            pack(shards, ranges, self._buffer, copied)
        return {n: s.holding(self.views[n]) for n, s in shards.items()}
