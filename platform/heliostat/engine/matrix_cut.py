"""Passes each worker's slices of matrices to an optimizer that orthogonalizes complete matrices, such as Muon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from heliostat.checkpoint.agreement import together
from heliostat.engine.sharded_state import ShardedState, SlicePlace
from heliostat.optim.matrix_shapes import sides
from heliostat.optim.whole_matrices import Matrix
from heliostat.recipes import building

Slice = tuple[tuple[int, int], int]  # ((start in the parameter, elements), offset in the flat tensor)


def announce(sharded: ShardedState, hidden: set[torch.nn.Parameter], device: torch.device) -> None:
    """Tells the optimizer which slice of each `hidden` matrix every worker has. The optimizer's state must exist. Collective."""
    optimizer: Any = sharded.optimizer
    flats = [(flat, group) for flat, group in sharded.groups() if group[0] in hidden]
    ours = [[_slice(sharded.place(p)) for p in group] for _, group in flats]
    spans = [[span for span, _ in slices] for slices in ours]
    group = dist.new_group(backend="gloo")
    everyones = together(group, lambda: spans)
    dist.destroy_process_group(group)
    matrices = {
        flat: list(_matrices(group, slices, [theirs[i] for theirs in everyones]))
        for i, ((flat, group), slices) in enumerate(zip(flats, ours, strict=True))
    }
    optimizer.cut_as(matrices, device)


def _slice(place: SlicePlace | None) -> Slice:
    """Describes this worker's slice of a parameter. The slice is empty if the worker has no part of the parameter."""
    return ((place.start, place.numel), place.offset) if place and place.numel else ((0, 0), 0)


def _matrices(group: list[torch.nn.Parameter], slices: list[Slice], everyones: list[list[tuple[int, int]]]) -> Iterator[Matrix]:
    """Yields the matrices of a flat tensor. A parameter can contain several matrices (`matrix_shapes.sides`)."""
    for i, p in enumerate(group):
        count, rows, columns = sides(building.shape(p))
        (begin, _), offset = slices[i]
        for number in range(count):
            first, size = number * rows * columns, rows * columns
            spans = tuple(_within(theirs[i], first, size) for theirs in everyones)
            mine = spans[dist.get_rank()]
            yield Matrix(rows, columns, spans, offset + first + mine[0] - begin if mine[1] else 0)


def _within(span: tuple[int, int], first: int, size: int) -> tuple[int, int]:
    """Computes which part of a slice is inside [first, first + size). Returns the part's start, counted from `first`, and the
    part's length. Both are numbers of elements."""
    start, stop = max(span[0], first), min(span[0] + span[1], first + size)
    return (start - first, stop - start) if stop > start else (0, 0)
