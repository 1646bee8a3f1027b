"""Fits conversations into rows of a maximum length: cuts or splits long ones, and packs short ones. All functions are pure."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Distributes conversations to packs of at most `room` tokens, by best-fit decreasing: the longest first, each into the
    fullest pack that has room for it.

    Returns the indices of the conversations of each pack. Packs are sorted by their first index, and indices are ascending within
    a pack. No length may exceed `room`.
    """
    left: list[tuple[int, int]] = []  # (tokens that a pack has room for, the pack's number), sorted
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect.bisect_left(left, (length, 0))
        if place == len(left):
            packs.append([])
            free, number = room, len(packs) - 1
        else:
            free, number = left.pop(place)
        packs[number].append(index)
        bisect.insort(left, (free - length, number))
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])


def cut(trained: np.ndarray, length: int) -> int:
    """Returns the number of tokens of a conversation that fit into `length` and end with a trained token; 0 if there are none.
    `trained`: bool [tokens]."""
    places = np.flatnonzero(trained[:length])
    return int(places[-1]) + 1 if len(places) else 0
