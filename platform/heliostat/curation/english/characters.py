"""Defines the kinds of characters that the rules for English words know, as bits of a table of code points."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from string import digits

import numpy as np
import regex

from heliostat.curation.english import rules

CODES = 0x40000  # no later code point is a letter, a symbol, or white space, except TAGS
TAGS = range(0xE0000, 0xE0200)  # tags and variation selectors
# characters that end a sentence, in any script (Unicode's Sentence_Terminal)
TERMINALS = frozenset(regex.findall(r"\p{Sentence_Terminal}", "".join(map(chr, range(0x20000)))))
# CCNet's punctuation (Wenzek et al. 2019, arXiv 1911.00359); a word that has only such characters is a symbol
SYMBOLS = TERMINALS | frozenset(
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«»´–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～"
    + "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
)
# kinds of characters, as bits. SPACE: Python's white space. WHITE: Unicode's, which separates sentences. ALPHABETIC: Python's
# letters. LETTER, LOWER, UPPER: those of the rules. PICTURE: \p{So}. INNER: the first character of a mark inside of a core.
# NAME: \w. LABEL: a character of a URL's host. LINE: the end of a line. PUNCTUATION: Unicode's category P.
(SPACE, WHITE, LINE, ALPHABETIC, SYMBOL, TERMINAL, PUNCTUATION, LETTER, LOWER, UPPER, DIGIT, DECIMAL, QUOTE, FIRST, LAST,
 BEFORE_STOP, PICTURE, INNER, NAME, LABEL) = (1 << bit for bit in range(20))  # fmt: skip
LABELS = r"A-Za-z0-9\u00a1-\uffff"
_PATTERNS = {
    WHITE: r"\s", LETTER: rules.LETTER, LOWER: rules.LOWER, UPPER: rules.UPPER, PICTURE: r"\p{So}", NAME: r"\w", LABEL: LABELS,
}  # fmt: skip
_CHARACTERS = {
    LINE: "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", SYMBOL: SYMBOLS, TERMINAL: TERMINALS, DIGIT: digits, QUOTE: rules.QUOTES,
    FIRST: rules.FIRST, LAST: rules.LAST, BEFORE_STOP: rules.BEFORE_STOP, INNER: ".…,:<>=/-–—~+*^",
}  # fmt: skip


def code_points(text: str) -> np.ndarray:
    """Returns the code point of each character, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@lru_cache(maxsize=1)
def kinds() -> np.ndarray:
    """Returns the kinds of each code point below CODES, then those of TAGS, and a zero for all others: uint32."""
    every = np.concatenate([np.arange(CODES, dtype="<u4"), np.array(TAGS, "<u4")]).tobytes().decode("utf-32-le", "surrogatepass")
    table = np.zeros(len(every) + 1, np.uint32)
    for bit, pattern in _PATTERNS.items():
        for run in regex.finditer(rf"[{pattern}]+", every, regex.V1):
            table[run.start() : run.end()] |= bit
    for bit, characters in _CHARACTERS.items():
        table[[ord(character) for character in characters]] |= bit
    categories = np.frombuffer("".join(map(unicodedata.category, every)).encode(), "S1").reshape(-1, 2)
    kind, spaces = categories[:, 0], np.fromiter(map(str.isspace, every), bool, len(every))
    decimals = (kind == b"N") & (categories[:, 1] == b"d")
    for bit, holds in ((SPACE, spaces), (ALPHABETIC, kind == b"L"), (DECIMAL, decimals), (PUNCTUATION, kind == b"P")):
        table[:-1][holds] |= bit
    table[(table & PICTURE) != 0] |= FIRST | LAST | INNER
    return table
