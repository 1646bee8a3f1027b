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
from functools import lru_cache
from itertools import accumulate

import numpy as np
import regex

from heliostat.tasks import spill

SEPARATOR, LETTER, JOINER, UNSPACED, CONTINUING, SKIPPED = range(6)
JOINERS = ".,:/-\u066b\u066c"
ALONE = (  # scripts without spaces
    r"ー\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Tham}\p{Javanese}\p{Balinese}"
)
OPTIONAL = (
    r"\p{Inherited}\p{Common}\p{Latin}\p{Greek}\p{Cyrillic}\p{Arabic}\p{Hebrew}\p{Syriac}"  # scripts whose marks don't count
)
VOICED = "\u3099\u309a"  # marks of kana, which change the sound
FOLDED = (range(0x3400), range(0xA000, 0xAC00), range(0xF900, 0x17000), range(0x18D00, 0x20000), range(0x2F800, 0x2FA20))
"""Code points that may be replaced by another code point for the comparison: all except Han, Hangul, Tangut, and private use."""
CODES = 0x110000
_END = rf"[\s!-+;-@\[-`{{-~]|[[{ALONE}]--\p{{M}}]"
END, LAST_END = (regex.compile(way + _END, regex.V1) for way in ("", "(?r)"))  # where to split long texts
LONGEST = 1 << 18
"""Maximum characters of a word that is never split. A longer word may become several words, so that memory is bounded."""

ZERO = ord("0")
BLOCK = 1 << 16  # characters, or values to hash, that are processed at once: their results fit into the CPU's cache
FACTOR, INVERSE = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 1 << 64)


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
    """Returns a hash for each span of values [start, stop), as uint64 [spans]. The spans must be in ascending order. A hash is a
    polynomial: the difference of two prefix sums, divided by a power of the base."""
    span_hashes, at = np.empty(len(starts), np.uint64), 0
    with np.errstate(over="ignore"):
        while at < len(starts):
            low = int(starts[at])
            upto = max(at + 1, int(np.searchsorted(stops, low + BLOCK, "right")))
            size = int(stops[upto - 1]) - low
            powers, inverse = _powers(size) if size > BLOCK else _block_powers()
            sums = np.zeros(size + 1, np.uint64)
            np.cumsum(values[low : low + size] * powers[:size], out=sums[1:])
            first = starts[at:upto] - low
            span_hashes[at:upto] = spill.mixed((sums[stops[at:upto] - low] - sums[first]) * inverse[first])
            at = upto
    return span_hashes


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    ones = np.full((2, size + 1), [[FACTOR], [INVERSE]], np.uint64)
    ones[:, 0] = 1
    return tuple(np.cumprod(ones, axis=1, dtype=np.uint64))


@lru_cache(maxsize=1)
def _block_powers() -> tuple[np.ndarray, np.ndarray]:
    return _powers(BLOCK)


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns two arrays with an entry per Unicode code point: the code point to use in comparisons, and the kind of character
    (such as LETTER)."""
    kinds, folded = np.zeros(CODES, np.uint8), np.arange(CODES, dtype=np.uint32)
    marks, alone = _having(r"\p{M}"), _having(ALONE)
    kinds[_having(r"\p{L}\p{N}") | marks] = LETTER
    kinds[[ord(c) for c in JOINERS]] = JOINER
    kinds[(kinds == LETTER) & alone] = UNSPACED
    kinds[marks & (alone | _having(VOICED))] = CONTINUING
    kinds[_having(r"\p{Cf}") | (marks & _having(OPTIONAL) & ~_having(VOICED))] = SKIPPED
    for code in (code for part in FOLDED for code in part):
        text = unicodedata.normalize("NFKD", chr(code).lower()).lower()
        if len(text) > 1:
            text = "".join(c for c in text if kinds[ord(c)] != SKIPPED)
        folded[code] = ord(text) if len(text) == 1 else ord(chr(code).lower()[0])
    folded[ord("ς")] = ord("σ")
    kinds = np.where(kinds == SKIPPED, SKIPPED, kinds[folded]).astype(np.uint8)
    digits = _having(r"\p{Nd}")[folded]  # includes digits such as ²
    folded[digits], kinds[digits] = ZERO, LETTER
    return folded, kinds


@lru_cache(maxsize=1)
def _ascii_tables() -> tuple[bytes, bytes]:
    """Returns the comparison value and the kind of each ASCII character, as tables for `bytes.translate`."""
    folded, kinds = (table[:128].astype(np.uint8).tobytes() for table in _tables())
    return folded + bytes(128), kinds + bytes(128)


@lru_cache(maxsize=1)
def _every() -> list[tuple[int, str]]:
    """Returns the ranges that contain all assigned Unicode code points, as pairs (first code point, the range's characters).
    After 0x40000 there are only tags and variation selectors."""
    return [(first, "".join(map(chr, range(first, stop)))) for first, stop in ((0, 0x40000), (0xE0000, 0xE0200))]


def _having(properties: str) -> np.ndarray:
    """Returns whether each Unicode code point matches a regular expression of Unicode properties and characters, as bool
    [CODES]."""
    table = np.zeros(CODES, bool)
    for first, text in _every():
        for run in regex.finditer(rf"[{properties}]+", text):
            table[first + run.start() : first + run.end()] = True
    return table


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
    """Finds the words of one part of a text, as arrays (`Block`). Every number is hashed as a single 0, so the other digits of a
    number are removed first."""
    raw, code, kind = _looked_up(text)
    at = np.flatnonzero(kind != SKIPPED) if len(kind) and kind.max() == SKIPPED else None
    if at is not None:
        raw, code, kind = raw[at], code[at], kind[at]
    digit = code == ZERO
    joins = np.flatnonzero(kind == JOINER)
    joins = joins[(joins > 0) & (joins < len(kind) - 1)]
    joins = joins[digit[joins - 1] & digit[joins + 1]]
    digit[joins], kind[joins] = True, LETTER
    starts, stops = _edges(kind)
    again = np.concatenate([[False], digit[1:] & digit[:-1]])[: len(digit)]
    gone = np.concatenate([[0], np.cumsum(again)])
    first, last = starts - gone[starts], stops - gone[stops]
    exact = hashes = hashed(np.where(digit, ZERO, code)[~again], first, last)
    numbers = digit[starts] & (last - first == 1)
    if numbers.any():
        exact, places = hashes.copy(), np.flatnonzero(digit)
        first, last = (np.searchsorted(places, edge[numbers]) for edge in (starts, stops))
        exact[numbers] = hashed(raw[places], first, last)
    if at is not None:
        starts, stops = at[starts], at[stops - 1] + 1
    return starts, stops, hashes, exact, numbers


def _looked_up(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the code points of a text, and the comparison value and kind of each."""
    if text.isascii():  # the same result, faster
        data = text.encode()
        raw, code, kind = (np.frombuffer(some, np.uint8) for some in (data, *map(data.translate, _ascii_tables())))
        return raw, code, kind.copy()
    raw = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    folded, kinds = _tables()
    return raw, folded[raw], kinds[raw]


def _edges(kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the start and end positions of each word in a text, from the kinds of the text's characters."""
    inside = np.zeros(len(kind) + 2, bool)
    inside[1:-1] = (kind == LETTER) | (kind >= UNSPACED)
    begins = inside[1:] & ~inside[:-1]
    ends = inside[:-1] & ~inside[1:]
    if len(kind) and kind.max() >= UNSPACED:
        new = kind == UNSPACED
        new[1:] |= (kind[1:] == LETTER) & (kind[:-1] >= UNSPACED)
        begins[:-1] |= new
        ends[:-1] |= new & inside[:-2]
    return np.flatnonzero(begins), np.flatnonzero(ends)
