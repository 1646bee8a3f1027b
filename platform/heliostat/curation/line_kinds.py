"""Finds lines of numbers, of one word, of capitals, and short lines, in one compiled pass over a text."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from heliostat.curation.compiled import compiled

SPACE, LETTER, CAPITAL, WORD = 1, 2, 4, 8  # kinds of characters; WORD: `\w` without digits and `_`
NUMBERS, ONE_WORD, CAPITALS, SHORT = range(1, 5)  # kinds of lines
CODES = 0x40000  # no later code point has one of these kinds


@lru_cache(maxsize=1)
def _kinds() -> np.ndarray:
    """Returns the kinds of each code point, as bits. The last entry is for all code points from CODES."""
    tests = ((SPACE, str.isspace), (LETTER, str.isalpha), (CAPITAL, str.isupper), (WORD, lambda c: c.isalnum() > c.isdecimal()))
    every = list(map(chr, range(CODES)))
    columns = [np.fromiter(map(test, every), np.uint8, CODES) * np.uint8(bit) for bit, test in tests]
    return np.append(np.bitwise_or.reduce(columns), np.uint8(0))


def kinds_of_lines(
    text: str, numbers: bool, single_words: bool, capital_letters: int, max_capitals: float, short_words: int
) -> tuple[list[list[int]], int]:
    """Lists the lines of a text that have a kind, and returns the number of words of all lines.

    Each row has the positions where the line begins and ends, where its text without white space at the edges begins and ends,
    the number of words, and the kind. The first kind of `NUMBERS`, `ONE_WORD`, `CAPITALS`, and `SHORT` counts.
    """
    ascii_only = text.isascii()
    codes = np.frombuffer(
        text.encode() if ascii_only else text.encode("utf-32-le", "surrogatepass"), "u1" if ascii_only else "<u4"
    )
    rows = np.empty((text.count("\n") + 1, 6), np.int64)
    count, words = _scan(codes, _kinds(), rows, numbers, single_words, capital_letters, max_capitals, short_words)
    return rows[:count].tolist(), words


@compiled
def _scan(
    codes: np.ndarray,
    kinds: np.ndarray,
    rows: np.ndarray,
    numbers: bool,
    single_words: bool,
    capital_letters: int,
    max_capitals: float,
    short_words: int,
) -> tuple[int, int]:
    count = total = begin = 0
    first = last = words = letters = capitals = 0
    inside = worded = False
    for at in range(len(codes) + 1):
        code = codes[at] if at < len(codes) else 10
        if code != 10:
            kind = kinds[min(code, CODES)]
            if kind & SPACE:
                inside = False
                continue
            if not inside:
                first = first if words else at
                words += 1
                inside = True
            last = at + 1
            letters += (kind & LETTER) != 0
            capitals += (kind & CAPITAL) != 0
            worded |= (kind & WORD) != 0
            continue
        if words:
            if numbers and not worded:
                line = NUMBERS
            elif single_words and words == 1:
                line = ONE_WORD
            elif letters >= capital_letters and capitals > max_capitals * letters:
                line = CAPITALS
            else:
                line = SHORT if words <= short_words else 0
            if line:
                rows[count, 0], rows[count, 1], rows[count, 2], rows[count, 3] = begin, at, first, last
                rows[count, 4], rows[count, 5] = words, line
                count += 1
        total += words
        begin = at + 1
        words = letters = capitals = 0
        inside = worded = False
    return count, total
