"""Measures the repetition in a text: duplicate lines and paragraphs, and repeated word n-grams."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
import xxhash

BLOCK = 1 << 16  # n-grams or parts that are compared, or are Python objects, at the same time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication keeps numbers distinct


def duplicates(parts: Iterable[str]) -> tuple[int, int, int]:
    """Returns the number of parts, the number of duplicates among the parts, and the number of characters in these duplicates.
    Only a hash of each part is in memory."""
    hashes, lengths = array("Q"), array("q")
    for part in parts:
        hashes.append(xxhash.xxh64_intdigest(part.encode("utf-8", "surrogatepass")))
        lengths.append(len(part))
    sizes = np.asarray(lengths)
    _, first = np.unique(np.asarray(hashes), return_index=True)
    return len(sizes), len(sizes) - len(first), int(sizes.sum() - sizes[first].sum())


class Repeats:
    """Counts the characters in repeated n-grams of a text. The text's words are given as hashes and lengths."""

    def __init__(self, words: np.ndarray, lengths: np.ndarray) -> None:
        self.words = words
        self.ends = np.zeros(len(lengths) + 1, np.int32)  # end of each word in the text without spaces
        np.cumsum(lengths, out=self.ends[1:])
        self._words, self._n = words.copy(), 1
        self._twice: np.ndarray | None = None  # positions at which the n-gram may be repeated; None: every position

    def _advance(self, n: int) -> np.ndarray:
        """Returns the hash of each n-gram of `n` words, uint64 [words - n + 1]. Successive calls need increasing values of
        `n`."""
        while self._n < n:
            for start in range(0, len(self.words) - self._n, BLOCK):
                stop = min(start + BLOCK, len(self.words) - self._n)
                part = self._words[start:stop]
                part *= _FACTOR
                part += self.words[start + self._n : stop + self._n]
                part ^= part >> np.uint64(29)
            self._n += 1
        return self._words[: len(self.words) - n + 1]

    def top_chars(self, n: int) -> int:
        """Counts the characters in all occurrences of the most frequent n-gram, with single spaces between its words. If
        several n-grams are equally frequent, the first counts."""
        if len(self.words) < n:
            return 0
        hashes = self._advance(n)
        ordered = np.sort(hashes)
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])).astype(np.int32)
        counts = np.diff(starts, append=np.int32(len(ordered)))
        most = int(counts.max())
        values = ordered[starts[counts == most]]
        del ordered, starts, counts
        at = _first_of(hashes, values)
        return int(self.ends[at + n] - self.ends[at] + n - 1) * most

    def duplicate_chars(self, n: int) -> int:
        """Counts the characters of n-grams that repeat an earlier n-gram of the text. Overlapping n-grams don't count twice."""
        if len(self.words) < n:
            return 0
        hashes = self._advance(n)
        places = self._twice  # a repeated n-gram begins with a shorter repeated n-gram
        if places is not None:
            places = places[places < len(hashes)]
            hashes = hashes[places]
        ordered = np.sort(hashes)
        several = ordered[1:][ordered[1:] == ordered[:-1]]
        several = several[np.concatenate([[True], several[1:] != several[:-1]])] if len(several) else several
        del ordered
        self._twice, groups = _among(hashes, places, several)
        return self._walk(n, self._twice, groups, len(several))

    def _walk(self, n: int, places: np.ndarray, groups: np.ndarray, count: int) -> int:
        seen, chars, free = bytearray(count), 0, 0
        for start in range(0, len(places), BLOCK):
            some = slice(start, start + BLOCK)
            for place, group in zip(places[some].tolist(), groups[some].tolist(), strict=True):
                if place < free:
                    continue
                if seen[group]:
                    chars += int(self.ends[place + n] - self.ends[place])
                    free = place + n
                else:
                    seen[group] = 1
        return chars


def _first_of(hashes: np.ndarray, values: np.ndarray) -> int:
    """Returns the position of the first hash that is in the sorted `values`. At least one of the hashes must be in `values`."""
    for start in range(0, len(hashes), BLOCK):
        part = hashes[start : start + BLOCK]
        which = np.minimum(np.searchsorted(values, part), len(values) - 1)
        places = np.flatnonzero(values[which] == part)
        if len(places):
            return start + int(places[0])
    raise AssertionError("none of the values is among the hashes")


def _among(hashes: np.ndarray, places: np.ndarray | None, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of the hashes that are in the sorted values, and, for each of these hashes, its index in the sorted
    values."""
    kept, groups = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for start in range(0, len(hashes) if len(values) else 0, BLOCK):
        part = hashes[start : start + BLOCK]
        which = np.minimum(np.searchsorted(values, part), len(values) - 1)
        here = np.flatnonzero(values[which] == part)
        kept.append((here + start).astype(np.int32) if places is None else places[start + here])
        groups.append(which[here].astype(np.int32))
    return np.concatenate(kept), np.concatenate(groups)
