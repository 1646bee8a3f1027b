"""Turns texts into comparable words. The stages `minhash`, `decontaminate`, and `repeated_*` use this definition of a word.

Like FineWeb (Penedo et al., 2024), the comparison ignores case, punctuation, white space, accents, and the values of numbers:
every number becomes 0. Texts are compared in NFC, so the encoding of an accent doesn't matter either. Three rules differ from
FineWeb:

- Marks are dropped in the scripts that can do without them (Latin, Greek, Cyrillic, Arabic, Hebrew). A vowel sign of Hindi stays.
- Where a script puts no spaces between words (Chinese, Japanese, Thai, ...), each character with its marks is a word.
- An n-gram that has only numbers is compared as written. Otherwise all tables of numbers would be equal.

A number includes single `.`, `,`, `:`, `/` and `-` between its digits: a date is one number.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import regex

from heliostat.curation.comparable_characters import (
    ALONE,
    JOINER,
    LETTER,
    SEPARATOR,
    SKIPPED,
    UNSPACED,
    ZERO,
    code_points,
    tables,
)
from heliostat.curation.comparable_characters import FACTOR as FACTOR

_END = rf"[\s!-+;-@\[-`{{-~]|[[{ALONE}]--\p{{M}}]"
END, LAST_END = (regex.compile(way + _END, regex.V1) for way in ("", "(?r)"))  # where to split long texts
LONGEST = 1 << 18
"""Maximum characters of a word that is never split. A longer word may become several words, so that memory is bounded."""

BLOCK = 1 << 16  # characters that are processed at once: their results fit into the CPU's cache


@dataclass(frozen=True)
class ComparableWords:
    """Holds the words of texts, one text after another.

    `counts`: the number of words of each text. `hashes`: a 64-bit hash per word, the same for words that compare as equal.
    `exact`: like `hashes`, but different numbers have different hashes. `numbers`: whether each word is a number.
    """

    counts: np.ndarray
    hashes: np.ndarray
    exact: np.ndarray
    numbers: np.ndarray

    def spans(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Returns a hash for each span of words [start, stop), as uint64 [spans]. The spans must be in ascending order. Spans
        that have only numbers are hashed as written."""
        span_hashes = hashed(self.hashes, starts, stops)
        if self.numbers.any():
            others = np.concatenate([[0], np.cumsum(~self.numbers)])
            alone = others[starts] == others[stops]
            span_hashes[alone] = hashed(self.exact, starts[alone], stops[alone])
        return span_hashes

    def ngrams(self, n: int, short: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Hashes every n-gram of the texts. Returns (hashes of all n-grams, number of n-grams per text).

        A text with fewer than `n` words has no n-gram or, with `short`, one n-gram of all its words.
        """
        ends = np.cumsum(self.counts)
        left = np.repeat(ends, self.counts) - np.arange(len(self.hashes))  # words from each word to the end of its text
        begins = left >= n
        if short:
            begins[(ends - self.counts)[self.counts > 0]] = True
        starts = np.flatnonzero(begins)
        counts = np.maximum(self.counts - n + 1, (self.counts > 0) if short else 0)
        return self.spans(starts, starts + np.minimum(left[starts], n)), counts


def words(texts: Sequence[str]) -> ComparableWords:
    """Splits texts into comparable words, and returns the words' hashes."""
    plain = [text if text.isascii() else unicodedata.normalize("NFC", text) for text in texts]
    begins = np.fromiter(accumulate((len(text) + 1 for text in plain), initial=0), np.int64)
    joined = plain[0] if len(plain) == 1 else "\n".join(plain)
    first, total = np.zeros(len(begins), np.int64), 0  # index of each text's first word
    hashes, exact, numbers, at = list[np.ndarray](), list[np.ndarray](), list[np.ndarray](), 0
    for starts, stops, *columns in _blocks(joined):
        upto = int(np.searchsorted(begins, stops[-1])) if len(stops) else at
        first[at:upto] = total + np.searchsorted(starts, begins[at:upto])
        at, total = upto, total + len(starts)
        for column, part in zip((hashes, exact, numbers), columns, strict=True):
            column.append(part)
    first[at:] = total
    if not any(part.any() for part in numbers):
        exact.clear()  # the same array as `hashes`
    joined_hashes = _joined(hashes)
    return ComparableWords(np.diff(first), joined_hashes, _joined(exact) if exact else joined_hashes, _joined(numbers))


def counted(text: str) -> int:
    """Counts the words of a text, as `words` does, but without Numba: for checks before a run. A word of more than LONGEST
    characters counts once."""
    raw, (folded, kinds) = code_points(text if text.isascii() else unicodedata.normalize("NFC", text)), tables()
    raw = raw[kinds[raw] != SKIPPED]
    kind, digit = np.append(kinds[raw], SEPARATOR), np.append(folded[raw] == ZERO, False)
    kind[(kind == JOINER) & np.roll(digit, 1) & np.roll(digit, -1)] = LETTER  # a mark inside a number
    before = np.roll(kind, 1)
    inside, within = ((part == LETTER) | (part >= UNSPACED) for part in (kind, before))
    return int((inside & (~within | (kind == UNSPACED) | ((kind == LETTER) & (before >= UNSPACED)))).sum())


def has_word(text: str) -> bool:
    """Checks whether a text has a word. Usually reads only the beginning."""
    return any(words([part]).counts[0] for part in (text[:64], text))


def edges(text: str) -> np.ndarray:
    """Returns the start and end of each word of a text, int [words, 2]. The number of words is the same as from `words`, also for
    a text that isn't in NFC."""
    places = _edges_of(text)
    plain = text if text.isascii() else unicodedata.normalize("NFC", text)
    return places if plain == text else _as_many(text, places, plain, _edges_of(plain))


def _edges_of(text: str) -> np.ndarray:
    return _joined([np.stack([starts, stops], axis=1) for starts, stops, *_ in _blocks(text)])


def _as_many(text: str, places: np.ndarray, plain: str, wanted: np.ndarray) -> np.ndarray:
    """Returns the start and end of a text's words, as many as the text has in NFC.

    If a piece between two white spaces has a different number of words in NFC, this function uses the NFC's words for this piece.
    It scales the positions of these words in proportion. NFC reorders marks of several scripts in a row, which may move the start
    of a word.
    """
    cuts, plain_cuts = _gaps(text), _gaps(plain)
    at, plain_at = np.searchsorted(places[:, 0], cuts), np.searchsorted(wanted[:, 0], plain_cuts)
    if (at == plain_at).all():
        return places
    parts = list[np.ndarray]()
    for i in range(len(cuts) - 1):
        own, other = places[at[i] : at[i + 1]], wanted[plain_at[i] : plain_at[i + 1]]
        if len(own) != len(other):
            begin, length = plain_cuts[i], plain_cuts[i + 1] - plain_cuts[i]
            own = cuts[i] + (other - begin) * (cuts[i + 1] - cuts[i]) // length
        parts.append(own)
    return _joined(parts)


def _gaps(text: str) -> np.ndarray:
    """Returns positions in a text, int [white-space characters + 2]: the start, the end of each white-space character, and a
    position after the text's end."""
    gaps = np.fromiter((gap.end() for gap in regex.finditer(r"\s", text)), np.int64)
    return np.concatenate([[0], gaps, [len(text) + 1]])


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenates the arrays in a list, and clears the list."""
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    parts.clear()
    return values


def hashed(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Returns a hash for each span of values [start, stop), as uint64 [spans]. The spans must be in ascending order."""
    from heliostat.curation.word_hashes import span_hashes  # imports Numba

    hashes = np.empty(len(starts), np.uint64)
    span_hashes(values, starts, stops, hashes)
    return hashes


Block = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # starts, stops, and the arrays of ComparableWords


def _blocks(text: str) -> Iterator[Block]:
    """Splits a text into parts, and yields the words of each part as arrays (`Block`). An empty text has one part."""
    begin = 0
    while True:
        end = _end(text, begin)
        starts, stops, hashes, exact, numbers = _block(text[begin:end])
        yield starts + begin, stops + begin, hashes, exact, numbers
        if end == len(text):
            return
        begin = end


def _end(text: str, begin: int) -> int:
    """Finds the end of a part of a text. A part ends at the end of a word or, in a word that is too long, after a fixed number of
    characters."""
    most = begin + BLOCK + LONGEST
    if (match := END.search(text, begin + BLOCK, most)) is not None:
        return match.start()
    if most >= len(text):
        return len(text)
    last = LAST_END.search(text, begin + 1, begin + BLOCK)
    return last.start() if last else most + (END.match(text, begin) is not None)


def _block(text: str) -> Block:
    """Finds the words of one part of a text, as arrays (`Block`)."""
    from heliostat.curation.word_hashes import scan  # imports Numba

    raw = code_points(text)
    columns = tuple(np.empty(len(raw), kind) for kind in (np.int64, np.int64, np.uint64, np.uint64, np.bool_))
    count = scan(raw, *tables(), *columns)
    starts, stops, hashes, exact, numbers = (column[:count].copy() for column in columns)
    return starts, stops, hashes, exact, numbers
