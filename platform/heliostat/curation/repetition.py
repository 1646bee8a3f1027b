"""Measures the repetition in a text: duplicate lines and paragraphs, and repeated word n-grams."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

BLOCK = 1 << 16  # n-grams that are Python objects at the same time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication keeps numbers distinct


def duplicates(parts: Iterable[list[str]]) -> tuple[int, int, int]:
    """Counts the parts, the duplicates among them, and the duplicates' characters. The parts come in lists. Only a hash of each
    part stays in memory."""
    count = chars = 0
    lengths, earlier = dict[int, int](), list[np.ndarray]()  # by hash
    for some in parts:
        sizes = list(map(len, some))
        count, chars = count + len(some), chars + sum(sizes)
        lengths.update(zip(map(hash, some), sizes, strict=True))
        if len(lengths) > BLOCK:
            earlier.append(np.array([[*lengths], [*lengths.values()]]))
            lengths = {}
    if not earlier:
        return count, count - len(lengths), chars - sum(lengths.values())
    hashes, every = np.concatenate([*earlier, np.array([[*lengths], [*lengths.values()]], np.int64)], axis=1)
    first = np.unique(hashes, return_index=True)[1]
    return count, count - len(first), chars - int(every[first].sum())


class Repeats:
    """Measures the repeated n-grams of texts. Each text is given as the hashes and the lengths of its words. Successive calls
    need increasing values of `n`.

    All texts are processed at once, because a call of NumPy takes longer than the words of a short text. A repeated n-gram begins
    with a repeated (n-1)-gram. So for each `n`, only the positions of these are compared.
    """

    def __init__(self, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        sizes = np.array([len(words) for words, _ in texts], np.int32)
        self._sizes, stops = sizes, np.cumsum(sizes, dtype=np.int32)
        self._firsts, self._texts = stops - sizes, np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self._words = np.concatenate([words for words, _ in texts])
        self._ends = np.zeros(len(self._words) + 1, np.int32)  # end of each word in the texts without spaces
        np.cumsum(np.concatenate([lengths for _, lengths in texts]), out=self._ends[1:])
        self._n, self._places = 1, np.arange(len(self._words), dtype=np.int32)
        self._hashes = self._words ^ (self._texts.astype(np.uint64) * _FACTOR)  # equal only in one text
        self._stops = stops[self._texts]  # the end of the text at each place
        self._groups: np.ndarray = np.zeros(0, np.int32)
        self._counts: np.ndarray = self._groups

    def _advance(self, n: int) -> None:
        """Finds the positions of repeated n-grams, the number of the n-gram at each position, and the occurrences of each."""
        while self._n < n and len(self._places):
            whole = np.flatnonzero(self._places < self._stops - self._n)
            places, stops, hashes = self._places[whole], self._stops[whole], self._hashes[whole]
            hashes *= _FACTOR
            hashes += self._words[places + self._n]
            hashes ^= hashes >> np.uint64(29)
            self._n += 1
            order = np.argsort(hashes)
            ordered = hashes[order]
            new = np.ones(len(ordered), bool)
            np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
            del ordered
            groups = np.empty(len(order), np.int32)
            groups[order] = np.cumsum(new, dtype=np.int32) - 1
            del order
            counts = np.bincount(groups)
            kept = np.flatnonzero(counts[groups] > 1)
            self._places, self._stops, self._hashes = places[kept], stops[kept], hashes[kept]
            self._groups, self._counts = groups[kept], counts

    def top_chars(self, n: int) -> np.ndarray:
        """Counts, for each text, the characters in all occurrences of the most frequent n-gram, with single spaces between its
        words. If several n-grams are equally frequent, the first counts."""
        self._advance(n)
        chars = np.zeros(len(self._sizes), np.int64)
        long = np.flatnonzero(self._sizes >= n)
        chars[long] = self._length(self._firsts[long], n) + n - 1
        if len(self._places):
            counts, texts = self._counts[self._groups], self._texts[self._places]
            starts = np.flatnonzero(np.diff(texts, prepend=-1))
            most = np.maximum.reduceat(counts, starts)
            top = np.flatnonzero(counts == np.repeat(most, np.diff(starts, append=len(texts))))
            first = self._places[top[np.searchsorted(top, starts)]]
            chars[texts[starts]] = (self._length(first, n) + n - 1) * most
        return chars

    def duplicate_chars(self, n: int) -> np.ndarray:
        """Counts, for each text, the characters of repeated n-grams, from the start of the text and without overlaps."""
        self._advance(n)
        seen, again, free = bytearray(len(self._counts)), array("i"), 0
        for start in range(0, len(self._places), BLOCK):
            some = slice(start, start + BLOCK)
            for place, group in zip(self._places[some].tolist(), self._groups[some].tolist(), strict=True):
                if place < free:
                    continue
                if seen[group]:
                    again.append(place)
                    free = place + n
                else:
                    seen[group] = 1
        places = np.asarray(again)
        chars = np.bincount(self._texts[places], self._length(places, n), len(self._sizes))
        return chars.astype(np.int64)

    def _length(self, places: np.ndarray, n: int) -> np.ndarray:
        """Returns the characters of the n-grams at these positions, without spaces."""
        return self._ends[places + n] - self._ends[places]
