"""Cuts a text into passages of at most so many tokens, at the ends of lines where there are some. Pure functions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def cut(text: str, begins: Sequence[int], size: int, overlap: int) -> list[tuple[int, int]]:
    """Returns the places (begin, end) in the text of passages of at most `size` tokens, which together are all of it.

    `begins` are the places of its tokens. A passage ends behind the last end of a line in its last quarter, if there is one, and
    the next begins `overlap` tokens before that.
    """
    found, first = list[tuple[int, int]](), 0
    while first < len(begins):
        stop = _stop(text, begins, first, size)
        begin, end = begins[first] if first else 0, begins[stop] if stop < len(begins) else len(text)
        if end > begin:
            found.append((begin, end))
        if stop == len(begins):
            break
        first = max(first + 1, stop - overlap)
    return found


def _stop(text: str, begins: Sequence[int], first: int, size: int) -> int:
    """Returns the token before which the passage that begins with the token `first` ends."""
    stop = first + size
    if stop >= len(begins):
        return len(begins)
    line_end = text.rfind("\n", begins[first + size * 3 // 4], begins[stop])
    return stop if line_end < 0 else bisect_right(begins, line_end, first + 1, stop)
