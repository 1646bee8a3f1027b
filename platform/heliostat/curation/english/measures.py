"""Counts what quality filters measure in a text's lines and words, with compiled loops."""

from __future__ import annotations

import numpy as np

from heliostat.curation.compiled import compiled
from heliostat.curation.english.characters import LINE, SPACE, TERMINAL
from heliostat.curation.english.parts import FACTOR, kind_of, mixed
from heliostat.curation.english.repetition import is_new, places, stripped
from heliostat.curation.english.words import HAS_LETTER, IS_SYMBOL

_LINE_END, _RETURN, _HYPHEN, _BULLET, _STOP, _DOTS = (ord(character) for character in "\n\r-•.…")


@compiled
def word_counts(lengths: np.ndarray, facts: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the number of words that aren't symbols, the number of their characters, the number of words with a letter, and
    the number of these that aren't symbols."""
    count = chars = letters = both = 0
    for length, fact in zip(lengths, facts):  # noqa: B905 - Numba doesn't know `strict`
        letter = fact & HAS_LETTER != 0
        letters += letter
        if not fact & IS_SYMBOL:
            count += 1
            chars += length
            both += letter
    return count, chars, letters, both


@compiled
def occurring(hashes: np.ndarray, wanted: np.ndarray) -> int:
    """Counts how many of the wanted hashes occur."""
    seen, left = np.zeros(len(wanted), np.bool_), len(wanted)
    for value in hashes:
        for number in range(len(wanted)):
            if wanted[number] == value and not seen[number]:
                seen[number] = True
                left -= 1
        if left == 0:
            break
    return len(wanted) - left


@compiled
def marked_lines(codes: np.ndarray, kinds: np.ndarray) -> tuple[int, int, int]:
    """Counts a text's lines, those that begin with a bullet, and those that end with an ellipsis. White space at both ends of a
    line doesn't count."""
    count, bullets, ellipses, at, size = 0, 0, 0, 0, len(codes)
    while at < size:
        stop = at
        while stop < size and not kind_of(kinds, codes[stop]) & LINE:
            stop += 1
        count += 1
        first, last = stripped(codes, kinds, at, stop)
        if first < last:
            bullets += codes[first] == _HYPHEN or codes[first] == _BULLET
            dots = last - first > 2 and codes[last - 1] == codes[last - 2] == codes[last - 3] == _STOP
            ellipses += dots or codes[last - 1] == _DOTS
        at = stop + 2 if stop + 1 < size and codes[stop] == _RETURN and codes[stop + 1] == _LINE_END else stop + 1
    return count, bullets, ellipses


@compiled
def filled_lines(codes: np.ndarray, kinds: np.ndarray, short: int) -> tuple[int, int, int, int, int]:
    """Counts a text's lines that aren't only white space, those that end with a terminal mark, those of at most `short`
    characters, the characters of duplicate lines, and the line ends of the text."""
    count = terminal = few = repeated = line_ends = 0
    for code in codes:
        line_ends += code == _LINE_END
    hashes, at, size = np.zeros(places(line_ends + 1), np.uint64), 0, len(codes)
    while at < size:
        start, total, filled, kind = at, np.uint64(0), False, 0
        while at < size and codes[at] != _LINE_END:
            kind = kind_of(kinds, codes[at])
            filled |= not kind & SPACE
            total = total * FACTOR + np.uint64(codes[at]) + np.uint64(1)
            at += 1
        if filled:
            count += 1
            terminal += kind & TERMINAL != 0
            few += at - start <= short
            if not is_new(hashes, mixed(total)):
                repeated += at - start
        at += 1
    return count, terminal, few, repeated, line_ends
