"""Says where a checkpoint's elements lie: each rank plans its own shard, and the plans of all merge into one small table.

A tensor's chunks are kept as runs: `[shard, shards, start, numel]` are that many consecutive shards with `numel` elements each,
the first from element `start` on. ZeRO cuts evenly, so a tensor has a run or two on any number of ranks; with
`train.zero.divide_within` it has one for each worker. That its chunks hold every element once is checked on the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from heliostat.errors import CheckpointError
from heliostat.storage import wire

Run = list[int]  # first shard, shards, start, elements in each
Tensors = dict[str, dict[str, Any]]  # by name: dtype, shape, runs


class Chunk(NamedTuple):
    """Describes the elements [start, start + numel) of a tensor, which a shard holds."""

    shard: int
    start: int
    numel: int


@wire.travels
class Part(NamedTuple):
    """Holds what some consecutive ranks have written: their shards, and their tensors, whose runs count these shards."""

    shards: list[dict[str, Any]]
    tensors: Tensors


def owners(names: Iterable[str], world: int) -> dict[str, int]:
    """Deals the tensors that every rank holds whole to the ranks that write them."""
    return {name: number % world for number, name in enumerate(sorted(names))}


def merge(one: Part, other: Part) -> Part:
    """Joins the parts of consecutive ranks; it changes the first."""
    base = len(one.shards)
    one.shards.extend(other.shards)
    for name, entry in other.tensors.items():
        runs = [[shard + base, *rest] for shard, *rest in entry["runs"]]
        if name in one.tensors:
            _extend(one.tensors[name]["runs"], runs)
        else:
            one.tensors[name] = {**entry, "runs": runs}
    return one


def root(step: int | None, facts: Mapping[str, Any], whole: Part) -> dict[str, Any]:
    """Builds the contents of `checkpoint.json`; CheckpointError if the ranks' slices leave elements out, or overlap."""
    for name, entry in whole.tensors.items():
        if said := fault(entry, len(whole.shards)):
            raise CheckpointError(f"{name!r} cannot be saved: {said}")
    return {**facts, "step": step, "shards": whole.shards, "tensors": whole.tensors}


def _extend(runs: list[Run], more: list[Run]) -> None:
    last, (shard, shards, start, numel) = runs[-1], more[0]
    if numel == last[3] and shard == last[0] + last[1] and start == last[2] + last[1] * numel:
        last[1] += shards
        more = more[1:]
    runs.extend(more)


def runs(chunks: Iterable[Chunk]) -> list[Run]:
    """Makes runs of single chunks."""
    out: list[Run] = []
    for chunk in chunks:
        new = [[chunk.shard, 1, chunk.start, chunk.numel]]
        if out:
            _extend(out, new)
        else:
            out = new
    return out


def chunks(runs: Iterable[Run], first: int = 0, stop: int | None = None) -> Iterator[Chunk]:
    """Yields the chunks that hold any of the elements [first, stop), or all of them; it looks at nothing else."""
    for shard, shards, start, numel in runs:
        low, high = 0, shards
        if stop is not None:
            if not numel or stop <= first:
                continue
            low, high = max(0, (first - start) // numel), min(shards, -(-(stop - start) // numel))
        for number in range(low, high):
            yield Chunk(shard + number, start + number * numel, numel)


def fault(entry: Mapping[str, Any], shards: int) -> str:
    """Finds what is wrong with a tensor's runs: elements in no chunk or in two, no such shard; empty if nothing is."""
    end = 0
    for shard, count, start, numel in sorted(entry["runs"], key=lambda run: run[2]):
        if start != end:
            return f"elements {end} to {start} are in no chunk, or in two"
        end += count * numel
        if shard + count > shards:
            return "a chunk lies in no shard"
    numel = math.prod(entry["shape"])
    return "" if end == numel else f"its chunks hold {end} of {numel} elements"
