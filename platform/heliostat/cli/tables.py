"""Formats tables as text: aligned columns that are never cut. A table wider than the terminal goes on in further lines a row."""

from __future__ import annotations

from collections.abc import Collection, Sequence

GAP = "  "
INDENT = "    "  # of a row's further lines


def lines(rows: Sequence[Sequence[str]], left: Collection[int] = (0,), width: int | None = None) -> list[str]:
    """Aligns rows of cells, the head first; columns in `left` begin at the left, all others end at the right.

    `width`: of the terminal; without one every row is one line.
    """
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [line for row in rows for line in _lines(row, widths, left, width)]


def _lines(row: Sequence[str], widths: list[int], left: Collection[int], width: int | None) -> list[str]:
    cells = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
    parts = [GAP.join(cells[begin:end]).rstrip() for begin, end in bands(widths, width)]
    return [parts[0], *(INDENT + part for part in parts[1:] if part)]


def bands(widths: Sequence[int], width: int | None) -> list[tuple[int, int]]:
    """Groups the columns into bands [begin, end) that stand side by side: as many as fit into `width`, at least one."""
    found, begin, used = list[tuple[int, int]](), 0, 0
    for i, one in enumerate(widths):
        if width is not None and i > begin and used + len(GAP) + one > width:
            found.append((begin, i))
            begin, used = i, len(INDENT) + one
        else:
            used += one + (len(GAP) if i > begin else 0)
    return [*found, (begin, len(widths))]
