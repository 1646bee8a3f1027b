"""Copies a rank's slices of the training state into one flat buffer in host memory, and finds in such buffers what another needs.

All slices are ranges of flat tensors (`flat_shard`), so a rank of any world size finds its own in the copies of all ranks of
another. The copies of a save (`HostCopy`) are views of a buffer that is kept from save to save: fresh memory costs more than the
copy. For GPUs it is pinned, and filled on a stream of its own during training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from heliostat.checkpoint.checksums import as_bytes
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.data.device_streams import CopyStream
from heliostat.errors import TrainingError

ALIGNED = 64  # bytes, so that each slice of a buffer can be viewed in its type


@dataclass(frozen=True)
class FlatRange:
    """Describes a slice [start, start + numel) of a flat tensor, of elements of `itemsize` bytes, at `offset` in a buffer."""

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
    """Describes `size` bytes at `source` in the copy of an old rank that belong at `target` in a new rank's buffer."""

    rank: int
    source: int
    target: int
    size: int


def layout(state: Mapping[str, torch.Tensor]) -> list[FlatRange]:
    """Lays the slices out in a buffer, by name."""
    ranges, offset = list[FlatRange](), 0
    for name in sorted(state):
        local, start = _local(state[name])
        if local.numel():
            ranges.append(FlatRange(name, start, local.numel(), local.element_size(), offset))
            offset += -(-ranges[-1].size // ALIGNED) * ALIGNED
    return ranges


def size(ranges: Iterable[FlatRange]) -> int:
    """Computes the bytes of the buffer of a layout."""
    return max((-(-(r.offset + r.size) // ALIGNED) * ALIGNED for r in ranges), default=0)


def pack(
    state: Mapping[str, torch.Tensor],
    ranges: Iterable[FlatRange],
    buffer: torch.Tensor,
    copied: Callable[[], None] = lambda: None,
) -> None:
    """Copies the slices into their places in a flat uint8 buffer on the CPU; calls `copied` for each.

    It only queues those of a GPU, on the current stream and first: the queue fills while the others are copied.
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
    """Finds every wanted byte in the ranks' copies, each once, neighbours together; TrainingError if one is in none of them."""
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
    """Appends a piece, as a part of the one before where the bytes between them are padding in both buffers."""
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
    """Copies slices in a thread; `views`: the last copies, by name, until the next `copy`."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, torch.Tensor] = {}
        self._ranges: list[FlatRange] = []
        self._buffer = as_buffer(0, False)

    def copy(self, shards: Mapping[str, FlatShard], copied: Callable[[], None]) -> dict[str, FlatShard]:
        """Copies the slices as of the last `mark`: on a GPU it only queues that, and `wait` waits. Calls `copied` for each."""
        ranges = layout(shards)
        if ranges != self._ranges:
            self.views, self._buffer = {}, as_buffer(0, False)  # the old buffer goes before there is a new one
            self._buffer = as_buffer(size(ranges), any(s.is_cuda for s in shards.values()))
            self._ranges = ranges
        places = {r.name: r for r in ranges}
        self.views = {n: _view(self._buffer, places.get(n, EMPTY), s.local) for n, s in shards.items()}
        with self.queue():
            pack(shards, ranges, self._buffer, copied)
        return {n: s.holding(self.views[n]) for n, s in shards.items()}
