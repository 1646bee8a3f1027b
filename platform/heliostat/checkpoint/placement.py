"""Records which shard holds which elements of a checkpoint.

Each rank plans its own shard; all plans are merged into one small table.

A tensor's chunks are stored as runs. A run `[shard, shards, start, numel]` is `shards` consecutive shards with `numel` elements
each. The first shard has the elements from `start` on. ZeRO shards evenly, so a tensor has one or two runs on any number of
ranks. With `train.zero.shard_group_size`, a tensor has one run per worker. `fault` checks the table: each element must be in
exactly one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

from pydantic import Field

from heliostat.checkpoint.columns import ROWS, Columns
from heliostat.storage import wire
from heliostat.storage.records import Whole

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes per element
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # name of a file in the checkpoint's own folder
Run = list[int]  # first shard, number of shards, start, elements in each shard


@wire.travels
@dataclass(frozen=True)
class SealedIndex:
    """Describes the file of a shard's index."""

    bytes: Whole
    crc32: Whole


@wire.travels
@dataclass(frozen=True)
class Shard:
    file: Name
    bytes: Whole
    index: SealedIndex | None = None  # since format 4


@wire.travels
@dataclass(frozen=True)
class ChunkPlace:
    """Describes the place of a chunk's elements in its shard's file, with the CRC-32 of each block."""

    start: Whole
    numel: Whole
    offset: Whole
    crc32: list[Whole]


@wire.travels
@dataclass(frozen=True)
class ListedChunk(ChunkPlace):
    """Describes a chunk in formats 2 and 3."""

    shard: Whole


@wire.travels
@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: list[Whole]
    runs: list[Annotated[list[Whole], Field(min_length=4, max_length=4)]] = field(default_factory=list)
    columns: Columns = ROWS  # since format 5
    chunks: list[ListedChunk] | None = None  # until format 3, instead of `runs`


Tensors = dict[str, Tensor]  # by name


class Chunk(NamedTuple):
    """Describes the elements [start, start + numel) of a tensor, which are in one shard."""

    shard: int
    start: int
    numel: int


@wire.travels
class WrittenPart(NamedTuple):
    """Holds the shards that some consecutive ranks wrote, and the tensors in these shards. The runs of the tensors refer to these
    shards."""

    shards: list[Shard]
    tensors: Tensors


def owners(names: Iterable[str], world: int) -> dict[str, int]:
    """Chooses the rank that writes each tensor, for tensors that every rank holds completely."""
    return {name: number % world for number, name in enumerate(sorted(names))}


def merge(one: WrittenPart, other: WrittenPart) -> WrittenPart:
    """Adds the shards and tensors of the following ranks (`other`) to those of the first ranks (`one`).

    Changes and returns `one`.
    """
    base = len(one.shards)
    one.shards.extend(other.shards)
    for name, entry in other.tensors.items():
        runs = [[shard + base, *rest] for shard, *rest in entry.runs]
        if name in one.tensors:
            _extend(one.tensors[name].runs, runs)
        else:
            one.tensors[name] = replace(entry, runs=runs)
    return one


def _extend(runs: list[Run], more: list[Run]) -> None:
    last, (shard, shards, start, numel) = runs[-1], more[0]
    if numel == last[3] and shard == last[0] + last[1] and start == last[2] + last[1] * numel:
        last[1] += shards
        more = more[1:]
    runs.extend(more)


def runs(chunks: Iterable[Chunk]) -> list[Run]:
    """Merges chunks into runs."""
    out: list[Run] = []
    for chunk in chunks:
        new = [[chunk.shard, 1, chunk.start, chunk.numel]]
        if out:
            _extend(out, new)
        else:
            out = new
    return out


def chunks(runs: Iterable[Run], first: int = 0, stop: int | None = None) -> Iterator[Chunk]:
    """Yields the chunks that hold any of the elements [first, stop).

    Without `stop`, yields all chunks, whatever `first` is. Skips all other chunks without iterating over them.
    """
    for shard, shards, start, numel in runs:
        low, high = 0, shards
        if stop is not None:
            if not numel or stop <= first:
                continue
            low, high = max(0, (first - start) // numel), min(shards, -(-(stop - start) // numel))
        for number in range(low, high):
            yield Chunk(shard + number, start + number * numel, numel)


def fault(entry: Tensor, shards: int) -> str:
    """Describes the fault in a tensor's runs: a missing or repeated element, or an unknown shard.

    Returns an empty string if the runs are valid.
    """
    end = 0
    for shard, count, start, numel in sorted(entry.runs, key=lambda run: run[2]):
        if start != end:
            return f"elements {end} to {start} are in no chunk, or in two"
        end += count * numel
        if shard + count > shards:
            return "a chunk is in no shard"
    numel = math.prod(entry.shape)
    return "" if end == numel else f"its chunks hold {end} of {numel} elements"
