"""Checks checkpoint data in blocks of 1 MiB. A chunk is the range of a tensor's elements that one shard has. Every block of a
chunk has a CRC-32, and unchecked bytes are never used.

To read a part of a chunk, a reader reads the complete blocks that contain this part. So a reader reads fewer than two additional
blocks per chunk, and no additional bytes for a complete chunk. Adjacent blocks of a file are read together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:  # the driver finds a run's checkpoints without importing torch
    import torch

BLOCK = 1 << 20
RUN_BLOCKS = 8  # maximum number of blocks per request


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Views the memory of a contiguous tensor as flat uint8."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def cut(data: torch.Tensor) -> Iterator[memoryview]:
    """Yields the blocks of a flat uint8 tensor on the CPU."""
    view = data.numpy().data
    for start in range(0, len(view), BLOCK):
        yield view[start : start + BLOCK]


@dataclass(frozen=True)
class Slice:
    """Describes a part of a chunk to read.

    `offset`, `size`: the chunk's first byte and its number of bytes in the file; `crc32`: one checksum per block; `first`: the
    part's first byte in the chunk; `target`: flat uint8 tensor that receives the part.
    """

    offset: int
    size: int
    crc32: list[int]
    first: int
    target: torch.Tensor


@dataclass(frozen=True)
class Block:
    """Describes a block in its file. `skip`: bytes of the block before the part that `target` receives."""

    offset: int
    size: int
    crc32: int
    skip: int
    target: torch.Tensor


def needed(part: Slice) -> Iterator[Block]:
    """Yields the blocks that contain a slice."""
    first, last = part.first, part.first + len(part.target)
    for number in range(first // BLOCK, -(-last // BLOCK)):
        start = number * BLOCK
        stop = min(start + BLOCK, part.size)
        target = part.target[max(start - first, 0) : stop - first]
        yield Block(part.offset + start, stop - start, part.crc32[number], max(first - start, 0), target)


def runs(parts: list[Slice]) -> list[list[Block]]:
    """Plans the reads for slices of one file. Returns one list of adjacent blocks for each read, in file order."""
    out: list[list[Block]] = []
    for block in sorted((b for p in parts for b in needed(p)), key=lambda b: b.offset):
        last = out[-1][-1] if out else None
        if last and last.offset + last.size == block.offset and _size(out[-1]) + block.size <= RUN_BLOCKS * BLOCK:
            out[-1].append(block)
        else:
            out.append([block])
    return out


def _size(run: list[Block]) -> int:
    return run[-1].offset + run[-1].size - run[0].offset


def read(
    file: pa.NativeFile, wanted: list[list[Block]], progressed: Callable[[], None] = lambda: None
) -> tuple[int, Block | None]:
    """Reads blocks, checks them, and fills the targets. Calls `progressed` after each request.

    Returns the number of bytes read, and the first block with a wrong checksum, or None if all blocks are intact.
    """
    import torch

    scratch, total = np.empty(RUN_BLOCKS * BLOCK, np.uint8), 0
    memory, source = scratch.data, torch.from_numpy(scratch)
    for run in wanted:
        size = _size(run)
        file.seek(run[0].offset)
        total += file.readinto(memory[:size])
        progressed()
        for block in run:
            at = block.offset - run[0].offset
            if zlib.crc32(memory[at : at + block.size]) != block.crc32:
                return total, block
            block.target.copy_(source[at + block.skip : at + block.skip + len(block.target)])
    return total, None
