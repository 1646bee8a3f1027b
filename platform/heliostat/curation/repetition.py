"""Measures how much of a text repeats itself: lines and paragraphs that are there twice, and n-grams of words."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: numbers stay apart when they are multiplied


def duplicates(parts: Iterable[str]) -> tuple[int, int, int]:
    """Counts the parts, those that were there before, and the characters of these."""
    seen, total, chars, count = set[str](), 0, 0, 0
    for part in parts:
        total += 1
        if part in seen:
            count += 1
            chars += len(part)
        else:
            seen.add(part)
    return total, count, chars


class Repeats:
    """Measures repeated n-grams of a text's words, given by their numbers and lengths."""

    def __init__(self, numbers: np.ndarray, lengths: np.ndarray) -> None:
        self.numbers = numbers.astype(np.uint64)
        self.ends = np.concatenate([[0], np.cumsum(lengths)])  # where each word ends, if all are written without a space
        self._hashes, self._n = self.numbers.copy(), 1
        self._twice = np.arange(len(numbers))  # where the n-gram may be one that is there more than once

    def _advance(self, n: int) -> np.ndarray:
        """Returns a hash of every n-gram; must be called with rising `n`."""
        while self._n < n:
            self._hashes = self._hashes[:-1] * _FACTOR + self.numbers[self._n :]
            self._hashes ^= self._hashes >> np.uint64(29)
            self._n += 1
        return self._hashes

    def top_chars(self, n: int) -> int:
        """Counts the characters that the most frequent n-gram takes, with single spaces in it; of several, the first."""
        if len(self.numbers) < n:
            return 0
        _, first, counts = np.unique(self._advance(n), return_index=True, return_counts=True)
        at = int(first[counts == counts.max()].min())
        return int(self.ends[at + n] - self.ends[at] + n - 1) * int(counts.max())

    def duplicate_chars(self, n: int) -> int:
        """Counts the characters of n-grams that were there before; read from the left, and none overlaps another."""
        if len(self.numbers) < n:
            return 0
        hashes = self._advance(n)
        twice = self._twice[self._twice <= len(hashes) - 1]  # an n-gram that is there twice begins with a shorter one that is
        if not len(twice):
            return 0
        _, group, counts = np.unique(hashes[twice], return_inverse=True, return_counts=True)
        several = counts[group] > 1
        self._twice, group = twice[several], group[several]
        return self._walk(n, self._twice.tolist(), group.tolist())

    def _walk(self, n: int, places: list[int], groups: list[int]) -> int:
        seen, chars, free = set[int](), 0, 0
        for place, group in zip(places, groups, strict=True):
            if place < free:
                continue
            if group in seen:
                chars += int(self.ends[place + n] - self.ends[place])
                free = place + n
            else:
                seen.add(group)
        return chars
