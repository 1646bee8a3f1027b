"""Describes in which order a checkpoint holds a matrix that workers cut by columns, and finds what is wanted in another order.

Tensors of a checkpoint are flat, and a worker's share is a slice of the flat tensor. One that has some columns of a matrix holds
a slice of those columns, row after row: in the matrix's own order that would be a piece of every row. So the order of such a
matrix is block after block of columns, each row after row, in which a share is a slice again; with one block it is the matrix's
own. What is wanted in another order lies in a rectangle of each block that has some of it. The arithmetic is pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from heliostat.storage import wire

if TYPE_CHECKING:  # the driver looks for a run's checkpoints without torch
    import torch


@wire.travels
class Columns(NamedTuple):
    """Describes an order: of a matrix with rows of `width` elements, so many equal blocks of columns one after another."""

    parts: int
    width: int


ROWS = Columns(1, 1)  # the tensor's own order, whatever its width


class Rectangle(NamedTuple):
    """Describes what some rows of one block have of what is wanted: they begin at element `start` of the order that is held,
    `width` elements each; of each `columns` are taken, behind the first `skip`, and go to column `into`."""

    start: int
    width: int
    skip: int
    columns: int
    into: int


class Move(NamedTuple):
    """Describes rows of one wanted block, of `width` elements each, from element `first` of the wanted order on."""

    first: int
    rows: int
    width: int
    parts: list[Rectangle]


def moves(have: Columns, want: Columns, numel: int, first: int, stop: int, most: int) -> Iterator[Move]:
    """Finds the elements [first, stop) of a matrix of `numel` elements in the wanted order, some `most` elements at a time.

    What is found of the first and the last row of a move may be more than is wanted.
    """
    if stop <= first:
        return
    width = max(have, want).width
    rows, mine, its = numel // width, width // want.parts, width // have.parts
    size, many = rows * mine, max(1, most // width)
    for block in range(first // size, -(-stop // size)):
        start, left, right = block * size, block * mine, (block + 1) * mine
        low, high = max(first - start, 0) // mine, -(-min(stop - start, size) // mine)
        holding = range(left // its, -(-right // its))
        for row in range(low, high, many):
            parts = [
                Rectangle(
                    (n * rows + row) * its,
                    its,
                    max(left - n * its, 0),
                    min(right, (n + 1) * its) - max(left, n * its),
                    max(n * its - left, 0),
                )
                for n in holding
            ]
            yield Move(start + row * mine, min(many, high - row), mine, parts)


def collect(
    read: Callable[[int, torch.Tensor], None],
    have: Columns,
    want: Columns,
    numel: int,
    first: int,
    target: torch.Tensor,
    most: int,
) -> None:
    """Fills a contiguous target with what it is to hold from element `first` of the wanted order on.

    `read(start, rows)` fills rows with elements of the order that is held.
    """
    import torch

    flat = target.view(-1)
    for move in moves(have, want, numel, first, first + len(flat), most):
        rows = torch.empty(move.rows, move.width, dtype=flat.dtype)
        for part in move.parts:
            source = torch.empty(move.rows, part.width, dtype=flat.dtype)
            read(part.start, source)
            rows[:, part.into : part.into + part.columns] = source[:, part.skip : part.skip + part.columns]
        low, high = max(first, move.first), min(first + len(flat), move.first + rows.numel())
        flat[low - first : high - first] = rows.view(-1)[low - move.first : high - move.first]
