"""Defines the value and the kind of each character for `heliostat.curation.comparable`, which compares words."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import numpy as np
import regex

from heliostat.tasks import cpu_time

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
ZERO = ord("0")
FACTOR, INVERSE = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 1 << 64)


def code_points(text: str) -> np.ndarray:
    """Returns the code points of a text: uint8 if all are ASCII, otherwise uint32."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@lru_cache(maxsize=1)
@cpu_time.loading()
def tables() -> tuple[np.ndarray, np.ndarray]:
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
