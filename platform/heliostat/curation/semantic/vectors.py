"""Computes cosine similarities, centers of cells, and the rows that stay, for vectors of 8-bit integers. All functions are pure.

If two vectors have at most LONGEST numbers, their dot product is an integer below 2**24. float32 represents such integers
exactly, in any order of summation. So the results are the same on every machine. Longer vectors are multiplied in pieces of
LONGEST numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

LONGEST = 1040  # maximum length of a vector: LONGEST * 127 * 127 < 2**24
TOGETHER = 512  # rows that are compared at once
ROUNDS = 10  # rounds of k-means
Vectors = Callable[[int, int], np.ndarray]  # returns the rows in the range [first, last), in the order of comparison


def lengths(vectors: np.ndarray) -> np.ndarray:
    """Returns the Euclidean length of each vector; 1 for a zero vector."""
    return np.maximum(1, np.sqrt((vectors.astype(np.int64) ** 2).sum(axis=1, dtype=np.int64))).astype(np.float32)


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the dot product of each vector in `a` with each vector in `b`, as float32 [a, b]. Products are exact if vectors
    have at most LONGEST numbers, and otherwise rounded."""
    pieces = [_whole(a[:, i : i + LONGEST], b[:, i : i + LONGEST]) for i in range(0, a.shape[1], LONGEST)]
    return pieces[0] if len(pieces) == 1 else np.stack(pieces).sum(axis=0, dtype=np.float64).astype(np.float32)


def _whole(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float32, copy=False) @ b.astype(np.float32, copy=False).T


def nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Returns, for each vector, the number of the center with the highest cosine similarity. In a tie, returns the first of these
    centers."""
    indices = [np.zeros(0, np.int64)]
    for start in range(0, len(vectors), TOGETHER):
        indices.append((products(vectors[start : start + TOGETHER], centres) / lengths(centres)).argmax(axis=1))
    return np.concatenate(indices)


def centres(sample: np.ndarray, count: int) -> np.ndarray:
    """Finds the centers of `count` cells by spherical k-means, starting from the first vectors. If there are fewer than `count`
    different vectors, each different vector has its own cell.

    (Lloyd 1982; Dhillon and Modha 2001.) A cell that loses all vectors keeps the same center.
    """
    _, firsts = np.unique(sample, axis=0, return_index=True)
    centroids = sample[np.sort(firsts)[:count]]
    unit = sample / lengths(sample)[:, None]
    for _ in range(ROUNDS):
        cells = nearest(sample, centroids)
        order = np.argsort(cells, kind="stable")
        used, starts = np.unique(cells[order], return_index=True)
        sums = np.add.reduceat(unit[order], starts, axis=0, dtype=np.float64)
        moved = centroids.copy()
        moved[used] = _rounded(sums)
        if (moved == centroids).all():
            break
        centroids = moved
    return centroids


def _rounded(sums: np.ndarray) -> np.ndarray:
    largest = np.abs(sums).max(axis=1, keepdims=True)
    return np.rint(sums * np.divide(127.0, largest, out=np.zeros_like(largest), where=largest > 0)).astype(np.int8)


@dataclass(frozen=True)
class Rows:
    """Holds vectors to compare, the vectors' lengths, and the vectors' positions in the order of comparison."""

    vectors: np.ndarray
    lengths: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, first: int) -> Rows:
        return cls(vectors.astype(np.float32), lengths(vectors), np.arange(first, first + len(vectors)))

    def __getitem__(self, which: slice | np.ndarray) -> Rows:
        return Rows(self.vectors[which], self.lengths[which], self.places[which])

    def __len__(self) -> int:
        return len(self.places)

    def blocks(self, size: int) -> Iterator[Rows]:
        yield from (self[start : start + size] for start in range(0, len(self), size))

    def cosines(self, others: Rows) -> np.ndarray:
        """Returns the cosine similarity of each row with each row of `others`, as an array [rows, others]."""
        return products(self.vectors, others.vectors) / others.lengths / self.lengths[:, None]


def sieve(vectors: Vectors, count: int, least: float, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Visits `count` rows in order. Drops a row if the cosine similarity with an earlier kept row is at least `least` (> 0).

    Returns two arrays [count]: the position of the nearest earlier kept row (-1: none), and the similarity with this row (0:
    none). The dropped rows are those with a similarity of at least `least`. At most 3 * `capacity` rows are in memory. Rows that
    stay are read again only if they are more than `capacity`.
    """
    near, best = np.full(count, -1, np.int64), np.zeros(count, np.float32)
    stayed = dict[int, Rows]()  # by the first row of a block
    for start in range(0, count, capacity):
        rows = Rows.of(vectors(start, min(start + capacity, count)), start)
        for before in range(0, start, capacity):
            stay = np.flatnonzero(best[before : before + capacity] < np.float32(least))
            if len(stay):
                kept = stayed.get(before)
                _closer(near, best, rows, Rows.of(vectors(before, before + capacity), before)[stay] if kept is None else kept)
        for first in range(0, len(rows), TOGETHER):
            stay = np.flatnonzero(best[start : start + first] < np.float32(least))
            part = rows[first : first + TOGETHER]
            _closer(near, best, part, rows[stay])
            _beside(near, best, part, least)
        stay = np.flatnonzero(best[start : start + len(rows)] < np.float32(least))
        if sum(map(len, stayed.values())) + len(stay) <= capacity:
            stayed[start] = rows[stay]
    return near, best


def _closer(near: np.ndarray, best: np.ndarray, rows: Rows, others: Rows) -> None:
    """Compares `rows` with the kept rows `others`. Where a row in `others` is more similar than `best`, updates `best` (the
    similarity) and `near` (the position of the row in `others`)."""
    for some in others.blocks(16 * TOGETHER):
        for part in rows.blocks(TOGETHER):
            cosines = part.cosines(some)
            place = cosines.argmax(axis=1)
            value = cosines[np.arange(len(part)), place]
            closer = value > best[part.places]
            near[part.places[closer]], best[part.places[closer]] = some.places[place[closer]], value[closer]


def _beside(near: np.ndarray, best: np.ndarray, part: Rows, least: float) -> None:
    """Compares each row of `part` with the earlier kept rows of `part`, one row after another. If one of these is more similar
    than `best`, updates `best` (the similarity) and `near` (the position of the more similar row)."""
    if (best[part.places] >= np.float32(least)).all():
        return  # none of these rows stays
    cosines, stays = part.cosines(part), np.zeros(len(part), bool)
    for i, at in enumerate(part.places.tolist()):
        before = np.flatnonzero(stays[:i])
        if len(before):
            place = before[cosines[i, before].argmax()]
            if cosines[i, place] > best[at]:
                near[at], best[at] = part.places[place], cosines[i, place]
        stays[i] = best[at] < np.float32(least)
