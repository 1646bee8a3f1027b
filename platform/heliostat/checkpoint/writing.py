"""Writes a folder of tensors from all ranks.

Each rank writes its own shard and the shard's index. Then rank 0 writes `checkpoint.json`.

A rank knows without messages which tensors it writes: its slices, and its share of the tensors that every rank holds
completely. The ranks' tables of written chunks are merged on their way to rank 0 (`placement.merge`). If one rank fails, all
ranks raise its error, and `checkpoint.json` isn't written. torch's own HuggingFaceStorageReader can read the shards, too.
"""

from __future__ import annotations

import json
import operator
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from heliostat.checkpoint import checksums, index, layout, placement, read_back, safetensors_file
from heliostat.checkpoint.agreement import Channel, first, merged
from heliostat.checkpoint.columns import ROWS
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.layout import INDEX, encode
from heliostat.checkpoint.placement import ChunkPlace, Shard, Tensor
from heliostat.errors import CheckpointError, WorkerError
from heliostat.storage import local_files
from heliostat.storage.lease import Fence
from heliostat.storage.locations import Location


def write(
    target: Location,
    step: int | None,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, object],
    channel: Channel,
    wrote: Callable[[], None] = lambda: None,
    fence: Fence | None = None,
    promised: Mapping[str, bool] | None = None,
) -> None:
    """Writes the tensors of all ranks as one folder. All ranks call this function together.

    `facts`: entries of `checkpoint.json` from rank 0; `wrote`: called after every written block, and after every uploaded part;
    `fence`: the lease of the driver that saves, if several drivers could save. `promised`: whether each tensor that must be there
    can be all zero; if there are any, all ranks read back what they wrote. If a rank fails, all ranks raise its error; an error
    that isn't heliostat's own becomes a CheckpointError. Raises CheckpointError also if the slices leave out elements.
    """
    rank, world = dist.get_rank(channel.group), dist.get_world_size(channel.group)
    try:
        first(channel, partial(clear, target, fence))
        seen: list[tuple[str, bool]] = []

        def write_own() -> placement.WrittenPart:
            own = mine(tensors, rank, world)
            written = write_shard(target, own, rank, wrote)
            if promised:
                seen.extend(read_back.compare(target, written, own))
            return written

        part = merged(channel, write_own, placement.merge)
        if promised:
            everywhere = merged(channel, lambda: seen, operator.add)
            first(channel, lambda: read_back.require(target, promised, everywhere or []))
        first(channel, partial(finish, target, step, facts, part, fence))
    except WorkerError as e:
        raise CheckpointError(f"{target}: can't save this folder: {e}") from e


def mine(tensors: Mapping[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """Selects the tensors that a rank writes: its non-empty slices, and its share of the complete tensors."""
    owners = placement.owners((n for n, t in tensors.items() if not isinstance(t, FlatShard)), world)
    return {n: t for n, t in tensors.items() if (t.local.numel() if isinstance(t, FlatShard) else owners[n] == rank)}


def clear(target: Location, fence: Fence | None) -> None:
    """Removes an earlier save of this step, or the remains of a failed save."""
    if fence:
        fence.check()
    target.join(INDEX).delete()
    target.delete()


def finish(
    target: Location, step: int | None, facts: Mapping[str, object], part: placement.WrittenPart | None, fence: Fence | None
) -> None:
    """Makes the folder valid: checks that the folder has every element exactly once, then writes `checkpoint.json`."""
    written = part or placement.WrittenPart([], {})
    contents = index.root(step, {"format": layout.format_of(written.tensors), **facts}, written)
    if fence:
        fence.check()
    target.join(INDEX).write(encode(contents))


def write_shard(
    target: Location, tensors: dict[str, torch.Tensor], rank: int, wrote: Callable[[], None]
) -> placement.WrittenPart:
    """Writes a rank's shard, then its index; returns the rank's part of `checkpoint.json`."""
    if not tensors:
        return placement.WrittenPart([], {})
    file = f"shard-{rank:05d}.safetensors"
    sums: dict[str, list[int]] = {name: [] for name in tensors}
    entries = [_entry(n, t, sums[n], wrote) for n, t in tensors.items()]
    with _local_folder(target) as local:
        offsets = safetensors_file.write(local / file, entries, _metadata(tensors))
        size = (local / file).stat().st_size
        if target.is_s3:
            target.join(file).upload(local / file, wrote)
    listing = index.encode({"tensors": {n: ChunkPlace(*_cut(t), offsets[n], sums[n]) for n, t in tensors.items()}})
    target.join(index.shard_name(file)).write(listing)
    return part(Shard(file, size, index.seal(listing)), tensors)


def part(shard: Shard, tensors: Mapping[str, torch.Tensor]) -> placement.WrittenPart:
    """Describes one shard and its tensors."""
    entries = placement.Tensors()
    for name, tensor in tensors.items():
        start, numel = _cut(tensor)
        columns = tensor.columns if isinstance(tensor, FlatShard) else ROWS
        entries[name] = Tensor(safetensors_file.NAMES[tensor.dtype], list(tensor.shape), [[0, 1, start, numel]], columns)
    return placement.WrittenPart([shard], entries)


def _cut(tensor: torch.Tensor) -> tuple[int, int]:
    return (tensor.start, tensor.local.numel()) if isinstance(tensor, FlatShard) else (0, tensor.numel())


def _entry(name: str, tensor: torch.Tensor, crc32: list[int], wrote: Callable[[], None]) -> safetensors_file.Entry:
    local = tensor.local if isinstance(tensor, FlatShard) else tensor.contiguous()
    return safetensors_file.Entry(name, local.dtype, tuple(local.shape), partial(_checked, local, crc32, wrote))


def _checked(tensor: torch.Tensor, crc32: list[int], wrote: Callable[[], None]) -> Iterator[memoryview]:
    """Yields the tensor's blocks for writing, and appends the CRC-32 of each to the list."""
    for block in checksums.cut(checksums.as_bytes(tensor)):
        crc32.append(zlib.crc32(block))
        yield block
        wrote()


def _metadata(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Makes the shard's metadata for torch's HuggingFaceStorageReader."""
    starts = {n: {"saved_offsets": [t.start] if isinstance(t, FlatShard) else [0] * t.dim()} for n, t in tensors.items()}
    return {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(starts)}


@contextmanager
def _local_folder(target: Location) -> Iterator[Path]:
    """Provides the folder to which shards are written: the target itself if it is on a disk; a temporary folder for S3."""
    if not target.is_s3:
        yield Path(target.path)
    else:
        with local_files.temporary_folder("heliostat-shard-") as name:
            yield name
