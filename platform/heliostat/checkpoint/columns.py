"""Describes the order of elements in a checkpoint for matrices that workers split by columns, and converts between orders.

Tensors of a checkpoint are flat, and a worker's shard is a slice of the flat tensor. A worker that has some columns of a matrix
has a part of every row. In the matrix's own order (row after row), these parts aren't one slice. So the matrix is stored in
blocks of columns, one block after another. Within a block, one row follows another. In this order, a worker's shard is one
slice. With one block, this order is the matrix's own order.

When a matrix is read in another order, each stored block contributes a rectangle to a wanted block. The functions of this module
only compute, and do no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from heliostat.storage import wire

if TYPE_CHECKING:  # the driver finds a run's checkpoints without importing torch
    import torch


@wire.travels
class Columns(NamedTuple):
    """Describes an order for a matrix with rows of `width` elements: `parts` equal blocks of columns, one after another."""

    parts: int
    width: int


ROWS = Columns(1, 1)  # the tensor's own order, for any width


class Rectangle(NamedTuple):
    """Describes the elements that some rows of a stored block contribute to a wanted block.

    In the stored order, the first of these rows starts at element `start`, and each row has `width` elements. In each row, the
    first `skip` elements are skipped. The next `columns` elements go to the wanted block, from column `into` on.
    """

    start: int
    width: int
    skip: int
    columns: int
    into: int


class Move(NamedTuple):
    """Describes one step of a conversion: `rows` consecutive rows of a wanted block, with `width` elements each.

    `first`: index of the first row's first element in the wanted order.
    """

    first: int
    rows: int
    width: int
    parts: list[Rectangle]


def moves(have: Columns, want: Columns, numel: int, first: int, stop: int, most: int) -> Iterator[Move]:
    """Plans how to read the elements [first, stop), counted in the wanted order, of a matrix of `numel` elements.

    A move has about `most` elements.

    The first and the last row of a move may contain elements that aren't wanted.
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
    """Fills a contiguous target with the elements of the wanted order from `first` on.

    `read(start, rows)`: fills `rows` with elements of the stored order from `start` on; `most`: approximate number of elements
    per move.
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
