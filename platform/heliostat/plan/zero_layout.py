"""Computes which slice of every parameter a rank owns under ZeRO. The functions are pure, and reproduce DeepSpeed 0.19.

Stages 1 and 2 flatten each parameter group into one vector, pad the vector to a multiple of 2 N, and divide it into N parts.
Stage 3 divides every parameter separately. At stage 0, every rank owns everything, and rank r saves part number r
(`sharded_state`). So the slices of a checkpoint are known before the checkpoint exists. Tests compare these slices with the
slices of real engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor

Slice = tuple[str, int, int]  # (parameter, start, number of elements)


def usual_groups(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Returns the optimizer's default parameter groups: first the matrices, then the vectors. A recipe that doesn't define groups
    gets these groups."""
    split = [[n for n, s in shapes.items() if len(s) > 1], [n for n, s in shapes.items() if len(s) <= 1]]
    return [g for g in split if g]


def slices(
    shapes: Mapping[str, tuple[int, ...]],
    stage: int,
    workers: int,
    groups: list[list[str]] | None = None,
    stacked: frozenset[str] = frozenset(),
    parts: int = 1,
    copies: int = 1,
) -> list[list[Slice]]:
    """Divides the trained parameters into the slices that each rank owns. Together, the slices cover every element once.

    `groups`: names of the parameters in each parameter group of the optimizer. At stage 3, `parts` workers may shard the
    `stacked` experts; then ZeRO shards each part over the workers that have this part. If `copies` is above 1, each of `copies`
    groups has all parameters, and owns a part of every slice.
    """
    if stage in (1, 2):
        out: list[list[Slice]] = [[] for _ in range(workers)]
        for group in usual_groups(shapes) if groups is None else groups:
            for rank, piece in _cut_group([(n, math.prod(shapes[n])) for n in group], workers):
                out[rank].append(piece)
        return out
    sizes, each = {n: math.prod(shape) for n, shape in shapes.items()}, workers // copies
    return [
        [s for n in sizes if (s := _share(_own(n, sizes[n], part, each, parts if n in stacked else 1), number, copies))[2]]
        for number, part in (divmod(rank, each) for rank in range(workers))
    ]


def divided(
    shapes: Mapping[str, tuple[int, ...]],
    stage: int,
    workers: int,
    groups: list[list[str]] | None,
    parts: int,
    whole: frozenset[str],
) -> list[list[Slice]]:
    """Divides the parameters of tensor-parallel workers (`train.parallel.tensor`) into the slices that each rank saves.

    `shapes`: shapes of one worker's shard. `parts`: number of tensor-parallel workers. `whole`: parameters that each of these
    workers has completely, and that only the first worker saves.
    """
    of_part = slices(shapes, stage, workers // parts, groups)
    return [
        [
            (name, (0 if name in whole else rank % parts * math.prod(shapes[name])) + start, numel)
            for name, start, numel in of_part[rank // parts]
            if name not in whole or rank % parts == 0
        ]
        for rank in range(workers)
    ]


def _own(name: str, numel: int, rank: int, workers: int, parts: int) -> Slice:
    part, replica = numel // parts, rank // parts
    per = -(-part // (workers // parts))
    start = min(replica * per, part)
    return name, rank % parts * part + start, min(per, part - start)


def _share(owned: Slice, number: int, copies: int) -> Slice:
    """Returns the part of a slice that one of several groups owns."""
    name, start, numel = owned
    per = -(-numel // copies)
    begin = min(number * per, numel)
    return name, start + begin, min(per, numel - begin)


def _cut_group(sizes: list[tuple[str, int]], workers: int) -> Iterator[tuple[int, Slice]]:
    total = sum(n for _, n in sizes)
    per = -(-total // (ALIGNMENT * workers)) * ALIGNMENT
    begin = 0
    for name, numel in sizes:
        at = begin
        while at < begin + numel:
            rank = at // per
            end = min((rank + 1) * per, begin + numel)
            yield rank, (name, at - begin, end - at)
            at = end
        begin += numel
