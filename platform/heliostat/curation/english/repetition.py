"""Measures the repetition in a text with compiled loops: duplicate lines and paragraphs, and repeated word n-grams."""

from __future__ import annotations

import numpy as np

from heliostat.curation.compiled import compiled
from heliostat.curation.english.characters import SPACE
from heliostat.curation.english.parts import FACTOR, kind_of, mixed

_LINE_END = ord("\n")


@compiled
def stripped(codes: np.ndarray, kinds: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """Returns the range [begin, end) of a text without white space at both ends."""
    while begin < end and kind_of(kinds, codes[begin]) & SPACE:
        begin += 1
    while begin < end and kind_of(kinds, codes[end - 1]) & SPACE:
        end -= 1
    return begin, end


@compiled
def is_new(hashes: np.ndarray, key: np.uint64) -> bool:
    """Adds a hash to an open-addressing table. Returns whether it wasn't in the table."""
    mask = np.uint64(len(hashes) - 1)
    at = key & mask
    while hashes[at] and hashes[at] != key:
        at = (at + np.uint64(1)) & mask
    if hashes[at]:
        return False
    hashes[at] = key
    return True


@compiled
def places(entries: int) -> int:
    """Returns the size of an open-addressing table: a power of two, at least twice the number of entries."""
    size = 16
    while size < 2 * entries:
        size *= 2
    return size


@compiled
def duplicates(codes: np.ndarray, begin: int, end: int, least: int) -> tuple[int, int, int]:
    """Counts the parts of a text between `least` line ends or more, the duplicates among them, and the duplicates' characters."""
    runs = 1
    for at in range(begin + 1, end):
        runs += codes[at - 1] == _LINE_END and codes[at] != _LINE_END
    hashes = np.zeros(places(runs + 1), np.uint64)
    count, repeated, chars, start, at, total = 0, 0, 0, begin, begin, np.uint64(0)
    while at <= end:
        if at < end and codes[at] != _LINE_END:
            total = total * FACTOR + np.uint64(codes[at]) + np.uint64(1)
            at += 1
            continue
        stop = at
        while stop < end and codes[stop] == _LINE_END:
            stop += 1
        if at < end and stop - at < least:
            total = total * FACTOR + np.uint64(_LINE_END) + np.uint64(1)
            at += 1
            continue
        count += 1
        if not is_new(hashes, mixed(total)):
            repeated += 1
            chars += at - start
        if at == end:
            break
        at = start = stop
        total = np.uint64(0)
    return count, repeated, chars


@compiled
def n_grams(hashes: np.ndarray, lengths: np.ndarray, least: int, middle: int, most: int) -> np.ndarray:
    """Counts a text's characters in repeated n-grams, for `n` from `least` to `most`. `hashes`, `lengths`: those of the words.

    Up to `middle`, the characters in all occurrences of the most frequent n-gram count, with single spaces between its words. If
    several n-grams are equally frequent, the first counts. For a larger `n`, the characters of duplicate n-grams count, from the
    start of the text and without overlaps.

    A repeated n-gram begins with a repeated (n-1)-gram. So for each `n`, only the places of these are compared.
    """
    size, kept = len(hashes), len(hashes)
    chars, ends = np.zeros(most - least + 1, np.int64), np.zeros(size + 1, np.int64)
    at, keys = np.empty(size, np.int32), np.empty(size, np.uint64)  # of repeated n-grams: the place, and the hash
    for word in range(size):
        ends[word + 1] = ends[word] + lengths[word]
        at[word], keys[word] = word, hashes[word]
    first, counts, table = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(places(size), np.int32)
    for n in range(2, most + 1):
        whole, mask = 0, np.uint64(places(kept) - 1)
        for entry in range(places(kept)):
            table[entry] = -1
        for i in range(kept):
            if at[i] + n > size:
                continue
            key = mixed(keys[i] * FACTOR + hashes[at[i] + n - 1])
            at[whole], keys[whole], counts[whole] = at[i], key, 0
            slot = key & mask
            while table[slot] >= 0 and keys[table[slot]] != key:
                slot = (slot + np.uint64(1)) & mask
            if table[slot] < 0:
                table[slot] = whole
            first[whole] = table[slot]
            counts[table[slot]] += 1
            whole += 1
        kept, top, best = 0, 1, 0
        for i in range(whole):
            if counts[first[i]] > 1:
                at[kept], keys[kept], first[kept] = at[i], keys[i], first[i]
                kept += 1
        if n < least:
            continue
        if n <= middle:
            for i in range(kept):
                if counts[first[i]] > top:
                    best, top = at[i], counts[first[i]]
            if n <= size:
                chars[n - least] = (ends[best + n] - ends[best] + n - 1) * top
            continue
        free = 0
        for i in range(kept):
            if at[i] < free:
                continue
            if counts[first[i]] > 0:
                counts[first[i]] = 0  # seen
            else:
                chars[n - least] += ends[at[i] + n] - ends[at[i]]
                free = at[i] + n
    return chars
