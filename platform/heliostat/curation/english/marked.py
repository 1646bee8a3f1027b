"""Splits parts with several marks, such as `(well-known)`, `foo.Bar[0],`, or `VT8233A).`, into words, with NumPy.

The rules of `tokens` look at a few neighbors of each character, so NumPy applies them to all characters of many parts at once. A
part isn't split here if its words may depend on more: on an exception such as "don't", on an emoticon such as ":)", on a unit
after a number, or on whether the part is a URL. `tokens` splits these parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from string import digits

import numpy as np
import regex

from heliostat.curation.comparable import FACTOR, hashed
from heliostat.curation.english import tokens
from heliostat.curation.english.plain import CODES, among, encoded, table

# classes of characters, as bits
LETTER, LOWER, UPPER, DIGIT, QUOTE, FIRST, LAST, BEFORE_STOP, SYMBOL, ODD, INNER, SIGN, DASH, BETWEEN = (
    1 << bit for bit in range(14)
)
_STOP, _COMMA, _HYPHEN, _PLUS, _DOLLAR, _EM_DASH, _SMALL_S, _CAPITAL_S, _APOSTROPHE, _CURLY = (
    ord(character) + 1 for character in ".,-+$—sS'’"
)
_FACTOR = np.uint64(FACTOR)


@dataclass(frozen=True)
class MarkedWords:
    """Holds the words of parts of a text.

    `split`: whether each part was split. `counts`: the number of words of each part that was split. The other arrays have an
    entry for each of these words: the hash, and the start and stop in `places`. `places`: the positions of the parts' characters
    in the text, with one more position after each part.
    """

    split: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    hashes: np.ndarray
    places: np.ndarray


@lru_cache(maxsize=1)
def _classes() -> np.ndarray:
    """Returns the classes of each code point, at the code point plus 1: uint16 [CODES + 2]. The first and the last have none."""
    every, classes = "".join(map(chr, range(CODES))), np.zeros(CODES + 2, np.uint16)
    for bit, members in ((LETTER, tokens.LETTER), (LOWER, tokens.LOWER), (UPPER, tokens.UPPER), (SYMBOL, r"\p{So}")):
        for run in regex.finditer(rf"[{members}]+", every, regex.V1):
            classes[run.start() + 1 : run.end() + 1] |= bit
    for bit, characters in (
        (DIGIT, digits), (QUOTE, tokens.QUOTES), (FIRST, tokens.FIRST), (LAST, tokens.LAST), (BEFORE_STOP, tokens.BEFORE_STOP),
        (ODD, "…°"), (INNER, ".,:<>=/-–—~+*^"), (SIGN, "+-*^"), (DASH, "-–—~"), (BETWEEN, ":<>=/"),
    ):  # fmt: skip
        classes[[ord(character) + 1 for character in characters]] |= bit
    classes[(classes & SYMBOL) != 0] |= FIRST | LAST | INNER
    classes[(classes & LOWER) != 0] |= BEFORE_STOP
    return classes


@lru_cache(maxsize=1)
def _units() -> np.ndarray:
    """Returns the table of the units that are split from a number."""
    return table(hashed(*encoded(tokens.UNITS)))


@lru_cache(maxsize=1)
def _odd_cores() -> np.ndarray:
    """Returns the table of the exceptions' cores."""
    parts = _Parts(*encoded([*tokens.EXCEPTIONS]))
    which = np.flatnonzero(parts.begins < parts.ends)
    return table(hashed(parts.values, parts.begins[which], parts.ends[which]))


@lru_cache(maxsize=1)
def _pairs() -> np.ndarray:
    """Returns the table of two words that may be a part of an emoticon or abbreviation."""
    first, second = (hashed(*encoded([pair[side] for pair in tokens.PAIRS])) for side in (0, 1))
    return table(first * _FACTOR + second)


class _Parts:
    """Finds the core of each part: the marks before and after the core are words. Between `ends` and `tails` is an ending such as
    's, which may be empty.

    All positions are in `values`. `sure`: whether the core is certain, except for exceptions.
    """

    def __init__(self, codes: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        sizes = stops - starts
        self.stops = np.cumsum(sizes + 1) - 1
        self.starts = self.stops - sizes
        size = int(self.stops[-1]) + 1 if len(sizes) else 0
        self.of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes + 1)  # the part of each value
        self.places = np.arange(size) + np.repeat(starts - self.starts, sizes + 1)
        self._padded = np.zeros(size + 5, np.uint32)  # two zeros before the parts, and three after them
        self.values = self._padded[2 : size + 2]
        self.values[:] = codes.take(self.places, mode="clip")
        self.values[self.stops] = 0
        self._classes = _classes().take(self._padded, mode="clip")
        self.classes = self._classes[2 : size + 2]
        self._find()

    def value(self, places: np.ndarray, offset: int = 0) -> np.ndarray:
        return self._padded[places + (2 + offset)]

    def has(self, bits: int, places: np.ndarray, offset: int = 0) -> np.ndarray:
        return (self._classes[places + (2 + offset)] & np.uint16(bits)) != 0

    def _find(self) -> None:
        classes, values = self.classes, self.values
        first, last = (classes & np.uint16(FIRST)) != 0, (classes & np.uint16(LAST)) != 0
        plus, stop = np.flatnonzero(values == _PLUS), np.flatnonzero(values == _STOP)
        first[plus] = ~self.has(DIGIT, plus, 1)
        last[stop] = self.has(BEFORE_STOP, stop, -1) | (self.has(UPPER, stop, -1) & self.has(UPPER, stop, -2))
        other = np.flatnonzero(~first)
        self.begins = other[np.searchsorted(other, self.starts)]
        other = np.concatenate([[-1], np.flatnonzero(~last)])
        self.tails = other[np.searchsorted(other, self.stops) - 1] + 1
        odd = (classes & np.uint16(ODD)) != 0
        odd[stop] = self.has(UPPER, stop, -2) & self.has(FIRST, stop, -2)  # a mark that counts as a letter
        dollar, dash = np.flatnonzero(values == _DOLLAR), np.flatnonzero(values == _EM_DASH)
        odd[dollar] = self.has(LETTER, dollar, -1)
        odd[dash] = self.value(dash, 1) == _EM_DASH
        sure = np.ones(len(self.starts), bool)
        sure[self.of[np.flatnonzero(odd)]] = False
        begins, ends = self.begins, self.tails.copy()
        runs = (self.value(begins) == _STOP) & (self.value(begins, 1) == _STOP)
        runs |= (self.value(ends, -1) == _STOP) & (self.value(ends, -2) == _STOP)
        s, apostrophe = self.value(ends, -1), self.value(ends, -2)
        owns = ((s == _SMALL_S) | (s == _CAPITAL_S)) & ((apostrophe == _APOSTROPHE) | (apostrophe == _CURLY))
        ends[owns] -= 2
        apostrophe = self.value(ends, -2)
        again = self.has(LAST, ends, -1) | (apostrophe == _APOSTROPHE) | (apostrophe == _CURLY)
        sure &= ~runs & ~(owns & (again | ~self.has(LETTER | DIGIT, ends, -1))) & (begins < ends)
        numbers = np.flatnonzero(classes & np.uint16(DIGIT))
        if len(numbers):
            after = numbers[np.searchsorted(numbers, ends) - 1] + 1  # after the last digit of the core
            units = np.flatnonzero(sure & (after > begins) & (after < ends) & (after >= ends - tokens.LONGEST_UNIT))
            sure[units[among(hashed(values, after[units], ends[units]), _units())]] = False
        self.ends, self.sure = ends, sure


def marked_words(codes: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> MarkedWords:
    """Splits parts of a text into words. `codes`: the text's code points plus 1; `starts`, `stops`: the parts' positions, in
    ascending order. A part has at most LONGEST_PLAIN characters."""
    p = _Parts(codes, starts, stops)
    begins, ends, tails, sure = p.begins, p.ends, p.tails, p.sure
    which = np.flatnonzero(sure)
    sure[which] = ~among(hashed(p.values, begins[which], ends[which]), _odd_cores())
    cores = np.zeros(len(p.values) + 1, np.int8)
    which = np.flatnonzero(sure & (ends - begins > 2))
    cores[begins[which] + 1] += 1
    cores[ends[which] - 1] -= 1
    new, urls = _inside(p, np.cumsum(cores, dtype=np.int8)[:-1] != 0)
    of_new = np.zeros(len(sure), bool)
    of_new[p.of[new]] = True
    sure &= ~(of_new & urls)
    first = np.zeros(len(p.values) + 1, bool)
    first[new] = True
    which = np.flatnonzero(sure)
    marks = np.zeros(len(p.values) + 1, np.int8)
    marks[p.starts[which]] += 1
    marks[begins[which] + 1] -= 1
    marks[tails[which]] += 1
    marks[p.stops[which]] -= 1
    first |= np.cumsum(marks, dtype=np.int8) != 0
    first[ends[which]] = True
    first[p.stops] = False
    words = np.flatnonzero(first[:-1])
    of = p.of[words]
    kept = sure[of]
    words, of = words[kept], of[kept]
    word_stops = np.minimum(np.append(words[1:], len(p.values)), p.stops[of])
    hashes = hashed(p.values, words, word_stops)
    pairs = np.flatnonzero(of[1:] == of[:-1])
    joined = pairs[among(hashes[pairs] * _FACTOR + hashes[pairs + 1], _pairs())]
    sure[of[joined]] = False
    kept = sure[of]
    counts = np.bincount(of[kept], minlength=len(sure))[sure]
    return MarkedWords(sure, counts, words[kept], word_stops[kept], hashes[kept], p.places)


def _inside(p: _Parts, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the words that begin inside of cores. `inside`: whether a value and its neighbors belong to a core. Returns the
    positions of these words, and whether each part may be a URL."""
    places = np.flatnonzero(inside & ((p.classes & np.uint16(INNER)) != 0))
    values, after = p.value(places), p.value(places, 1)
    stop, letter_before, letter_after = values == _STOP, p.has(LETTER, places, -1), p.has(LETTER, places, 1)
    digit_before, digit_after = p.has(DIGIT, places, -1), p.has(DIGIT, places, 1)
    alone = p.has(SYMBOL, places)
    alone |= p.has(SIGN, places) & digit_before & (digit_after | (after == _HYPHEN))
    alone |= stop & p.has(LOWER | QUOTE, places, -1) & p.has(UPPER | QUOTE, places, 1)
    alone |= (values == _COMMA) & letter_before & letter_after
    alone |= p.has(DASH | BETWEEN, places) & (letter_before | digit_before) & letter_after
    new = [places[alone], places[alone] + 1]
    hyphens = places[(values == _HYPHEN) & (after == _HYPHEN) & letter_before]
    for size in (2, 3):
        run = hyphens[p.has(LETTER, hyphens, size) & (p.value(hyphens, size - 1) == _HYPHEN)]
        run = run[inside[run + size - 1]]
        new += [run, run + size]
    stops = places[stop]
    stop_before, stop_after = p.value(stops, -1) == _STOP, p.value(stops, 1) == _STOP
    new += [stops[~stop_before & stop_after], stops[stop_before & ~stop_after] + 1]
    urls = np.bincount(p.of[places[stop & digit_before & digit_after]], minlength=len(p.stops)) >= 3
    urls[p.of[stops[p.has(LOWER, stops, 1) & p.has(LOWER, stops, 2)]]] = True
    return np.concatenate(new), urls
