"""Splits parts of a text between white space into words with compiled loops, by the rules in `rules`."""

from __future__ import annotations

import numpy as np

from heliostat.curation.compiled import compiled
from heliostat.curation.english.characters import (
    BEFORE_STOP,
    DIGIT,
    FIRST,
    INNER,
    LAST,
    LETTER,
    LOWER,
    PICTURE,
    QUOTE,
    UPPER,
)  # fmt: skip
from heliostat.curation.english.parts import FACTOR, PAIR, SEQUENCE, UNIT, code_at, has, hash_of, mixed, value_of
from heliostat.curation.english.rules import LONGEST_EXCEPTION, LONGEST_UNIT
from heliostat.curation.english.urls import is_url

_STOP, _COMMA, _HYPHEN, _PLUS, _DOLLAR, _COLON, _SLASH, _TILDE, _STAR, _CARET, _LESS, _EQUALS, _MORE = (
    ord(c) for c in ".,-+$:/~*^<=>"
)
_DOTS, _EN_DASH, _EM_DASH, _DEGREE, _APOSTROPHE, _CURLY, _SMALL_S, _CAPITAL_S = (ord(c) for c in "…–—°'’sS")
_U, _S, _C, _A, _F, _K = (ord(c) for c in "USCAFK")


@compiled
def exception(sums: np.ndarray, table: np.ndarray, begin: int, end: int) -> int:
    """Returns the sizes of the words of an exception, in 4 bits each from the right; 0 if the characters aren't an exception."""
    if not 0 < end - begin <= LONGEST_EXCEPTION:
        return 0
    return int(np.int64(value_of(table, hash_of(sums, begin, end))))


@compiled
def split(chars: np.ndarray, sums: np.ndarray, table: np.ndarray, words: np.ndarray, size: int) -> int:
    """Splits the first `size` characters into words. Returns the number of words, and writes the first character of each word to
    `words`. The end of `words` holds the marks after the core, from right to left."""
    begin, end, count, after = 0, size, 0, len(words)
    while begin < end and not exception(sums, table, begin, end):
        first = _prefix(chars, begin, end)
        if first and exception(sums, table, begin + first, end):
            words[count] = begin
            count += 1
            begin += first
            break
        last = _suffix(chars, sums, table, begin + first, end)
        if last and exception(sums, table, begin, end - last):
            end -= last
            after -= 1
            words[after] = end
            break
        if first:
            words[count] = begin
            count += 1
        if last:
            after -= 1
            words[after] = end - last
        begin += first
        end -= last
        if first + last == 0:
            break
    if begin < end:
        count = _middle(chars, sums, table, words, begin, end, count)
    for place in range(after, len(words)):
        words[count] = words[place]
        count += 1
    words[count] = size
    return _joined(sums, table, words, count) if count > 1 else count


@compiled
def _prefix(chars: np.ndarray, begin: int, end: int) -> int:
    """Returns the length of the mark to split off at the start; 0 if there is none."""
    code = code_at(chars, begin)
    if has(chars, begin, FIRST):
        return 1
    if code == _STOP:
        at = begin
        while at < end and code_at(chars, at) == _STOP:
            at += 1
        return at - begin if at - begin > 1 else 0
    if code == _PLUS:
        return 0 if begin + 1 < end and has(chars, begin + 1, DIGIT) else 1
    if code in (_C, _A) and begin + 1 < end and code_at(chars, begin + 1) == _DOLLAR:
        return 2
    if code == _U and begin + 2 < end and code_at(chars, begin + 1) == _S and code_at(chars, begin + 2) == _DOLLAR:
        return 3
    return 0


@compiled
def _suffix(chars: np.ndarray, sums: np.ndarray, table: np.ndarray, begin: int, end: int) -> int:
    """Returns the length of the longest mark, ending, or unit to split off at the end; 0 if there is none."""
    if begin >= end:
        return 0
    last = code_at(chars, end - 1)
    if last == _STOP:
        at = end
        while at > begin and code_at(chars, at - 1) == _STOP:
            at -= 1
        return end - at if end - at > 1 else _full_stop(chars, begin, end)
    if last == _DOTS:
        return 2 if end - begin > 1 and code_at(chars, end - 2) == _DOTS else 1
    if end - begin > 1 and last in (_SMALL_S, _CAPITAL_S) and code_at(chars, end - 2) in (_APOSTROPHE, _CURLY):
        return 2
    if has(chars, end - 1, LAST):
        return 1
    for size in range(min(LONGEST_UNIT, end - begin - 1), 0, -1):
        if has(chars, end - size - 1, DIGIT) and value_of(table, hash_of(sums, end - size, end) ^ UNIT):
            return size
    return 0


@compiled
def _full_stop(chars: np.ndarray, begin: int, end: int) -> int:
    """Returns 1 if the period at the end is split off, and otherwise 0."""
    if end - begin < 2:
        return 0
    if has(chars, end - 2, LOWER | BEFORE_STOP):
        return 1
    if end - begin < 3:
        return 0
    code = code_at(chars, end - 2) & ~np.uint32(32)
    if code_at(chars, end - 3) == _DEGREE and code in (_F, _C, _K):
        return 1
    return 1 if has(chars, end - 2, UPPER) and has(chars, end - 3, UPPER) else 0


@compiled
def _middle(chars: np.ndarray, sums: np.ndarray, table: np.ndarray, words: np.ndarray, begin: int, end: int, count: int) -> int:
    """Splits a core at the marks between its letters, unless it is an exception or a URL. Returns the number of words."""
    sizes = exception(sums, table, begin, end)
    if sizes:
        return _put(words, sizes, begin, end, count)
    inner = False
    for at in range(begin + 1, end):
        inner |= has(chars, at, INNER)
    at = start = begin
    if inner and not is_url(chars, begin, end):
        while at < end:
            size = _infix(chars, at, begin, end) if has(chars, at, INNER) else 0
            if size == 0:
                at += 1
                continue
            if at > begin:
                if at > start:
                    words[count] = start
                    count += 1
                words[count] = at
                count += 1
                start = at + size
            at += size
    if start < end:
        words[count] = start
        count += 1
    return count


@compiled
def _put(words: np.ndarray, sizes: int, begin: int, end: int, count: int) -> int:
    """Adds the words of an exception. Returns the number of words."""
    while begin < end:
        words[count] = begin
        begin += sizes & 15
        sizes >>= 4
        count += 1
    return count


@compiled
def _infix(chars: np.ndarray, at: int, begin: int, end: int) -> int:
    """Returns the length of the mark inside of the core [begin, end) that begins at a position; 0 if there is none."""
    code = code_at(chars, at)
    if code == _DOTS or has(chars, at, PICTURE):
        return 1
    if code == _STOP and at + 1 < end and code_at(chars, at + 1) == _STOP:
        stop = at
        while stop < end and code_at(chars, stop) == _STOP:
            stop += 1
        return stop - at
    if at == begin or at + 1 == end:
        return 0
    letter, digit = has(chars, at - 1, LETTER), has(chars, at - 1, DIGIT)
    number = has(chars, at + 1, DIGIT) or code_at(chars, at + 1) == _HYPHEN
    if digit and number and code in (_PLUS, _HYPHEN, _STAR, _CARET):
        return 1
    if code == _STOP:
        return 1 if has(chars, at - 1, LOWER | QUOTE) and has(chars, at + 1, UPPER | QUOTE) else 0
    if code == _COMMA:
        return 1 if letter and has(chars, at + 1, LETTER) else 0
    if not (letter or digit):
        return 0
    if code == _HYPHEN and code_at(chars, at + 1) == _HYPHEN:
        if at + 3 < end and code_at(chars, at + 2) == _HYPHEN and has(chars, at + 3, LETTER):
            return 3
        return 2 if at + 2 < end and has(chars, at + 2, LETTER) else 0
    if code == _EM_DASH and code_at(chars, at + 1) == _EM_DASH:
        return 2 if at + 2 < end and has(chars, at + 2, LETTER) else 0
    between = code in (_HYPHEN, _EN_DASH, _EM_DASH, _TILDE, _COLON, _LESS, _MORE, _EQUALS, _SLASH)
    return 1 if between and has(chars, at + 1, LETTER) else 0


@compiled
def _joined(sums: np.ndarray, table: np.ndarray, words: np.ndarray, count: int) -> int:
    """Joins words that are an exception together, such as emoticons that the rules split. The longest sequence is joined first.
    Returns the number of words."""
    any_pair, before = False, hash_of(sums, words[0], words[1])
    for word in range(1, count):
        key = hash_of(sums, words[word], words[word + 1])
        any_pair |= value_of(table, mixed(before * FACTOR + key) ^ PAIR) != 0
        before = key
    return _joined_again(sums, table, words, count) if any_pair else count


@compiled
def _joined_again(sums: np.ndarray, table: np.ndarray, words: np.ndarray, count: int) -> int:
    taken, chosen, old = np.zeros(count, np.bool_), np.zeros((count, 2), np.int64), np.empty(count + 1, np.int32)
    for word in range(count + 1):
        old[word] = words[word]
    for length in range(min(LONGEST_EXCEPTION, count), 1, -1):
        for first in range(count - length + 1):
            known = value_of(table, _sequence(sums, words, first, length) ^ SEQUENCE)
            if known:
                if not (taken[first] or taken[first + length - 1]):
                    chosen[first, 0], chosen[first, 1] = length, np.int64(known)
                for word in range(first, first + length):
                    taken[word] = True
    first, joined = 0, 0
    while first < count:
        length = max(1, chosen[first, 0])
        if length > 1:
            joined = _put(words, chosen[first, 1], old[first], old[first + length], joined)
        else:
            words[joined] = old[first]
            joined += 1
        first += length
    words[joined] = old[count]
    return joined


@compiled
def _sequence(sums: np.ndarray, words: np.ndarray, first: int, length: int) -> np.uint64:
    """Returns the hash of a sequence of words."""
    key = hash_of(sums, words[first], words[first + 1])
    for word in range(first + 1, first + length):
        key = mixed(key * FACTOR + hash_of(sums, words[word], words[word + 1]))
    return key
