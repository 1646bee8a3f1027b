"""Finds the words of `heliostat.curation.comparable`, and hashes words and spans of words, in compiled loops.

The hash of a sequence is its polynomial with the base FACTOR, modulo 2^64, mixed like `spill.mixed`. Files of earlier versions
have these hashes, so they must not change.
"""

from __future__ import annotations

import numpy as np

from heliostat.curation.comparable_characters import FACTOR, INVERSE, JOINER, LETTER, SEPARATOR, SKIPPED, UNSPACED, ZERO
from heliostat.curation.compiled import compiled, finalized

BASE, BACK, DIGIT, NONE, ONE = (np.uint64(value) for value in (FACTOR, INVERSE, ZERO, 0, 1))


@compiled
def scan(
    raw: np.ndarray,
    folded: np.ndarray,
    kinds: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    hashes: np.ndarray,
    exact: np.ndarray,
    numbers: np.ndarray,
) -> int:
    """Finds the words of a text, from its code points. Writes the columns of `comparable.Block`, and returns the number of words.

    `folded` and `kinds`: the value to compare, and the kind, of each code point. Each number in a word is hashed as a single 0.
    """
    count = 0
    hash = own = NONE  # of the word, and of its digits as written
    power = own_power = ONE
    previous = SEPARATOR
    after_digit = in_number = number = False
    for at in range(len(raw) + 1):
        code, kind = NONE, SEPARATOR  # after the text
        if at < len(raw):
            code, kind = np.uint64(folded[raw[at]]), kinds[raw[at]]
        if kind == SKIPPED:
            continue
        digit = code == DIGIT
        is_part = digit  # of a number
        if kind == JOINER and after_digit:
            following = at + 1
            while following < len(raw) and kinds[raw[following]] == SKIPPED:
                following += 1
            if following < len(raw) and folded[raw[following]] == ZERO:
                is_part, kind = True, LETTER
        after_digit = digit
        inside = kind == LETTER or kind >= UNSPACED
        within = previous == LETTER or previous >= UNSPACED
        if within and (not inside or kind == UNSPACED or (kind == LETTER and previous >= UNSPACED)):
            hashes[count] = finalized(hash)
            exact[count] = finalized(own) if number else hashes[count]
            numbers[count] = number
            count += 1
            within = False
        if inside:
            if not within:
                starts[count] = at
                hash, own, power, own_power = NONE, NONE, ONE, ONE
                number, in_number = True, False
            stops[count] = at + 1
            if is_part:
                own += np.uint64(raw[at]) * own_power
                own_power *= BASE
            if not is_part or not in_number:
                hash += (DIGIT if is_part else code) * power
                power *= BASE
            number = number and is_part
            in_number = is_part
        previous = kind
    return count


@compiled
def span_hashes(values: np.ndarray, starts: np.ndarray, stops: np.ndarray, out: np.ndarray) -> None:
    """Hashes each span of values [start, stop). The starts and the stops are in ascending order, so one polynomial slides along
    the values."""
    low = high = 0
    total, power = NONE, ONE
    for i in range(len(starts)):
        if starts[i] >= high:
            low = high = starts[i]
            total, power = NONE, ONE
        while low < starts[i]:
            total, power, low = (total - np.uint64(values[low])) * BACK, power * BACK, low + 1
        while high < stops[i]:
            total, power, high = total + np.uint64(values[high]) * power, power * BASE, high + 1
        out[i] = finalized(total)


@compiled
def smallest(hashes: np.ndarray, size: int, places: np.ndarray) -> int:
    """Writes the position of the smallest of every `size` consecutive hashes, each position once; the first of equal hashes.
    Returns the number of positions."""
    count, least = 0, -1
    for last in range(size - 1, len(hashes)):
        if least <= last - size:  # the smallest has left, or there is none yet
            least = last - size + 1
            for at in range(least + 1, last + 1):
                if hashes[at] < hashes[least]:
                    least = at
        elif hashes[last] < hashes[least]:
            least = last
        if not count or places[count - 1] != least:
            places[count] = least
            count += 1
    return count
