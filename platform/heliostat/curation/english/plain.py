"""Splits texts into parts at white space, and the plain parts into words, with NumPy.

A plain part has a core, at most one mark before the core, and at most one mark after the core: `word`, `(word`, `word.`. A core
has only letters, or it is a number or a name such as `x86_64` and `to_list`. A single character is a core, too. `tokens` splits
plain parts into the same words. `marked` and `tokens` split all other parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from string import ascii_lowercase, digits

import numpy as np
import regex

from heliostat.curation.comparable import hashed
from heliostat.curation.english.tokens import EXCEPTIONS, ODD_CORES, PLAIN_MARKS

CODES = 0x34000  # no later code point is a letter, a mark, a symbol, or white space
LONGEST_PLAIN = 256  # maximum characters of the core of a plain part
# kinds of characters, as bits; a character that has no bit makes a part not plain
SPACE, LETTER, LOWER, MARK, PERIOD, SYMBOL, DIGIT, UNDERSCORE = (1 << bit for bit in range(8))
# characters that end a sentence, in any script (Unicode's Sentence_Terminal)
TERMINALS = frozenset(regex.findall(r"\p{Sentence_Terminal}", "".join(map(chr, range(0x20000)))))
# CCNet's punctuation (Wenzek et al. 2019, arXiv 1911.00359); a word that has only such characters is a symbol
SYMBOLS = TERMINALS | frozenset(
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～"
    + "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
)
BARE, MARKED = 1, 2  # bits: the core is special without marks, or with marks
_PLACES = 18  # bits of a hash that are its place in a table


@dataclass(frozen=True)
class TextParts:
    """Holds the parts of a text. All arrays have an entry for each part.

    `starts`, `stops`: positions in the text. `plain`: whether the part is plain. `before`, `after`: the number of marks before
    and after the core, 0 or 1. `hashes`: the hash of the core. `letters`: whether the core has a letter. The last four are valid
    only for plain parts.
    """

    starts: np.ndarray
    stops: np.ndarray
    plain: np.ndarray
    before: np.ndarray
    after: np.ndarray
    hashes: np.ndarray
    letters: np.ndarray


@lru_cache(maxsize=1)
def _kinds() -> np.ndarray:
    """Returns the kind of each code point, uint8 [CODES]."""
    every = "".join(map(chr, range(CODES)))
    kinds = np.fromiter(map(str.isalpha, every), bool, CODES) * np.uint8(LETTER)
    kinds |= np.fromiter(map(str.isspace, every), bool, CODES) * np.uint8(SPACE)
    for bit, characters in (
        (LOWER, ascii_lowercase), (MARK, PLAIN_MARKS), (PERIOD, "."), (SYMBOL, SYMBOLS), (DIGIT, digits), (UNDERSCORE, "_"),
    ):  # fmt: skip
        kinds[[ord(character) for character in characters]] |= bit
    return kinds


@lru_cache(maxsize=1)
def _ascii_kinds() -> bytes:
    return _kinds()[:128].tobytes() + bytes(128)


def looked_up(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the code point of each character plus 1, and its kind."""
    if text.isascii():  # the same result, faster
        data = text.encode()
        return np.frombuffer(data, np.uint8) + np.uint8(1), np.frombuffer(data.translate(_ascii_kinds()), np.uint8)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return codes + np.uint32(1), _kinds().take(codes, mode="clip")


def encoded(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the code points plus 1 of strings, and the start and stop of each."""
    edges = np.fromiter(accumulate(map(len, strings), initial=0), np.int64)
    return looked_up("".join(strings))[0], edges[:-1], edges[1:]


def table(hashes: np.ndarray) -> np.ndarray:
    """Builds a table of hashes for `among`: bool."""
    rows = np.zeros(1 << _PLACES, bool)
    rows[hashes >> np.uint64(64 - _PLACES)] = True
    return rows


def among(hashes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns the entry of each hash in a table. Hashes that aren't in the table may have the same entry."""
    return table[hashes >> np.uint64(64 - _PLACES)]


@lru_cache(maxsize=1)
def _special() -> np.ndarray:
    """Returns the table of the words for which `tokens` has special rules: bits BARE and MARKED."""
    bits = np.zeros(1 << _PLACES, np.uint8)
    for bit, words in ((BARE, EXCEPTIONS), (MARKED, ODD_CORES)):
        bits |= table(hashed(*encoded([word for word in words if word.replace("_", "").isalnum()]))) * np.uint8(bit)
    return bits


def parts(codes: np.ndarray, kinds: np.ndarray) -> TextParts:
    """Splits a text into parts. `codes`, `kinds`: the text's characters, from `looked_up`."""
    others = np.concatenate([[-1], np.flatnonzero((kinds & LETTER) == 0), [len(kinds)]])  # no letters; a space at both ends
    kind = np.full(len(others), SPACE, np.uint8)
    kind[1:-1] = kinds[others[1:-1]]
    spaces = np.flatnonzero((kind & SPACE) != 0)
    filled = np.flatnonzero(np.diff(others[spaces]) > 1)
    left, right = spaces[filled], spaces[filled + 1]  # in `others`: the white space around each part
    starts, stops = others[left] + 1, others[right]
    first, last = kinds[starts], kinds[stops - 1]
    single = stops - starts == 1
    before = ((first & MARK) != 0) & ~single
    after = ((last & MARK) != 0) | (((last & PERIOD) != 0) & ((kinds[stops - 2] & (LOWER | DIGIT)) != 0))
    after &= ~single
    begins, ends = starts + before, stops - after
    marks, sizes = before.astype(np.int64) + after, ends - begins
    letters = sizes + marks - (right - left - 1)
    plain = (letters == sizes) & (sizes > 0) & (sizes <= LONGEST_PLAIN) | single
    # a number or a name has letters, digits, and underscores: a digit at the end, or an underscore and letters
    strange = np.zeros(len(kind) + 1, np.int32)
    np.cumsum((kind & (DIGIT | UNDERSCORE)) == 0, out=strange[1:])
    which = np.flatnonzero((letters < sizes) & (sizes <= LONGEST_PLAIN))
    which = which[strange[right[which] - after[which]] == strange[left[which] + 1 + before[which]]]
    end = right[which] - 1 - after[which]  # in `others`: the last digit or underscore
    ending = kind[end] & np.where(others[end] == ends[which] - 1, DIGIT, UNDERSCORE)
    plain[which] = (ending != 0) & ((kinds[begins[which]] & UNDERSCORE) == 0)
    which = np.flatnonzero(plain)
    hashes = np.zeros(len(starts), np.uint64)
    hashes[which] = hashed(codes, begins[which], ends[which])
    marked = marks[which] > 0
    special = among(hashes[which], _special()) & np.where(marked, MARKED, BARE).astype(np.uint8)
    plain[which[special != 0]] = False
    return TextParts(starts, stops, plain, before, after, hashes, letters > 0)
