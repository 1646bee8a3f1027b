"""Measures the repetition in a text: duplicate lines and paragraphs, and repeated word n-grams."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

BLOCK = 1 << 16  # n-grams that are Python objects at the same time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication keeps numbers distinct


def duplicates(parts: Iterable[list[str]]) -> tuple[int, int, int]:
    """Counts the parts, the duplicates among them, and the duplicates' characters. The parts come in lists. Only a hash of each
    part stays in memory."""
    hashes, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for some in parts:
        hashes.append(np.fromiter(map(hash, some), np.int64, len(some)))
        lengths.append(np.fromiter(map(len, some), np.int32, len(some)))
    every, sizes = np.concatenate(hashes), np.concatenate(lengths)
    order = np.argsort(every)
    again = order[1:][every[order[1:]] == every[order[:-1]]]  # all except one of equal parts
    return len(every), len(again), int(sizes[again].sum())


class Repeats:
    """Measures the repeated n-grams of a text. The text's words are given as hashes and lengths. Successive calls need increasing
    values of `n`.

    A repeated n-gram begins with a repeated (n-1)-gram. So for each `n`, only the positions of these are compared.
    """

    def __init__(self, words: np.ndarray, lengths: np.ndarray) -> None:
        self.words = words
        self.ends = np.zeros(len(lengths) + 1, np.int32)  # end of each word in the text without spaces
        np.cumsum(lengths, out=self.ends[1:])
        self._n, self._places, self._hashes = 1, np.arange(len(words), dtype=np.int32), words
        self._groups = self._counts = np.zeros(0, np.int32)

    def _advance(self, n: int) -> None:
        """Finds the positions of repeated n-grams, the number of the n-gram at each position, and the occurrences of each."""
        while self._n < n and len(self._places):
            places = self._places[: int(np.searchsorted(self._places, len(self.words) - self._n))]
            hashes = self._hashes[: len(places)] * _FACTOR
            hashes += self.words[self._n :][places]
            hashes ^= hashes >> np.uint64(29)
            self._n += 1
            order = np.argsort(hashes)
            ordered = hashes[order]
            new = np.ones(len(ordered), bool)
            np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
            del ordered
            numbers = np.cumsum(new, dtype=np.int32)
            groups = np.empty_like(numbers)
            groups[order] = numbers - 1
            del order, numbers
            counts = np.bincount(groups)
            kept = np.flatnonzero(counts[groups] > 1)
            self._places, self._hashes, self._groups, self._counts = places[kept], hashes[kept], groups[kept], counts

    def top_chars(self, n: int) -> int:
        """Counts the characters in all occurrences of the most frequent n-gram, with single spaces between its words. If
        several n-grams are equally frequent, the first counts."""
        if len(self.words) < n:
            return 0
        self._advance(n)
        at, most = 0, 1
        if len(self._places):
            counts = self._counts[self._groups]
            first = int(counts.argmax())
            at, most = int(self._places[first]), int(counts[first])
        return int(self.ends[at + n] - self.ends[at] + n - 1) * most

    def duplicate_chars(self, n: int) -> int:
        """Counts the characters of repeated n-grams, from the start of the text and without overlaps."""
        self._advance(n)
        seen, chars, free = bytearray(len(self._counts)), 0, 0
        for start in range(0, len(self._places), BLOCK):
            some = slice(start, start + BLOCK)
            for place, group in zip(self._places[some].tolist(), self._groups[some].tolist(), strict=True):
                if place < free:
                    continue
                if seen[group]:
                    chars += int(self.ends[place + n] - self.ends[place])
                    free = place + n
                else:
                    seen[group] = 1
        return chars
