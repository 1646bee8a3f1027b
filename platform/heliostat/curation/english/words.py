"""Turns texts into the numbers of their words, with what the filters ask of each word kept in tables.

What stands between white space is split once and remembered, because a text's words are mostly those of the texts before: a
document then costs a look-up a word. The memory is bounded: it is emptied when it holds much, which changes no result.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import regex

from heliostat.curation.english.tokens import tokens

MOST_WORDS, MOST_CHARS = 1 << 20, 1 << 25  # that are remembered before a text is begun
RECENT_TEXTS, RECENT_CHARS = 256, 1 << 22  # whose words the next stages are likely to ask for
# what ends a sentence, in any script (Unicode's Sentence_Terminal)
TERMINALS = frozenset(regex.findall(r"\p{Sentence_Terminal}", "".join(map(chr, range(0x20000)))))
# What CCNet (Wenzek et al. 2019, arXiv 1911.00359) takes for punctuation; a word of nothing else is a symbol
_SYMBOLS = TERMINALS | frozenset(
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～"
    + "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
)


class Words:
    """Gives words numbers in the order of their appearance; `length`, `symbol` and `alphabetic` are tables by number."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._parts: dict[str, tuple[int, ...]] = {}
        self._numbers: dict[str, int] = {}
        self._recent: dict[str, np.ndarray] = {}
        self._chars = self._recent_chars = 0
        self.length = np.zeros(1024, np.int32)
        self.symbol = np.zeros(1024, bool)
        self.alphabetic = np.zeros(1024, bool)

    def numbers(self, text: str) -> np.ndarray:
        """Returns the number of each word of the text, which hold until the next call."""
        known = self._recent.get(text)
        if known is not None:
            return known
        if len(self._numbers) > MOST_WORDS or self._chars > MOST_CHARS:
            self._forget()
        parts = text.split()
        for part in set(parts).difference(self._parts):
            self._chars += len(part)
            self._parts[part] = tuple(map(self.number, tokens(part)))
        found = np.fromiter(chain.from_iterable(map(self._parts.__getitem__, parts)), np.int32)
        if len(self._recent) >= RECENT_TEXTS or self._recent_chars > RECENT_CHARS:
            self._recent, self._recent_chars = {}, 0
        self._recent[text] = found
        self._recent_chars += len(text)
        return found

    def number(self, word: str) -> int:
        """Returns the number of a word."""
        known = self._numbers.get(word)
        if known is not None:
            return known
        number = self._numbers[word] = len(self._numbers)
        if number == len(self.length):
            for table in ("length", "symbol", "alphabetic"):
                setattr(self, table, np.concatenate([getattr(self, table), np.zeros_like(getattr(self, table))]))
        self.length[number] = len(word)
        self.symbol[number] = _SYMBOLS.issuperset(word)
        self.alphabetic[number] = word.isalpha() or any(map(str.isalpha, word))
        return number


shared = Words()  # of a process: what one filter has split, the next need not
