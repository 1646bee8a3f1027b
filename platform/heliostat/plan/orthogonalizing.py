"""Estimates what an optimizer that orthogonalizes whole matrices adds to a step (`heliostat.optim.whole_matrices`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from heliostat.plan.counts import ModelStats

ITERATIONS = 5  # of Newton and Schulz
ELEMENT = 4  # bytes of an element on its way: momenta travel in fp32


def matrices(model: ModelStats) -> Iterator[tuple[int, int]]:
    """Yields the sides of all hidden matrices; a stack of experts has one for each."""
    for name in model.hidden:
        *stacked, rows, columns = model.shapes[name]
        yield from ((rows, columns) for _ in range(math.prod(stacked)))


def moved(elements: int, workers: int, stage: int) -> int:
    """Estimates the bytes that each worker sends in a step: its slices to the workers that matrices fall to, and as many results
    back; 1 / workers of them stay where they are. At stage 0 all workers have whole matrices."""
    return 2 * ELEMENT * elements * (workers - 1) // workers**2 if stage else 0


def flops(sides: Iterable[tuple[int, int]]) -> float:
    """Counts the FLOPs that orthogonalize matrices: in each iteration two products of a square with the matrix, and one of two
    squares of its shorter side."""
    return float(sum(ITERATIONS * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in sides))
