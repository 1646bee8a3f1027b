"""Splits texts into words. Represents each word by its hash, and by the facts that filters need, such as its number of
characters.

Each string between white space is split once and cached, because most words of a text have appeared in earlier texts. So a
document needs only one look-up per word. Memory is bounded: texts are processed in slices, and the cache is emptied when it is
large. This changes no result.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct

import numpy as np
import regex
import xxhash

from heliostat.curation.english.tokens import tokens
from heliostat.curation.slices import slices

MOST_WORDS, MOST_CHARS = 1 << 18, 1 << 23  # maximum cached words, and characters, before a new slice
RECENT_TEXTS, RECENT_CHARS = 256, 1 << 22  # texts whose words are cached for the next stages
# characters that end a sentence, in any script (Unicode's Sentence_Terminal)
TERMINALS = frozenset(regex.findall(r"\p{Sentence_Terminal}", "".join(map(chr, range(0x20000)))))
# CCNet's punctuation (Wenzek et al. 2019, arXiv 1911.00359); a word that has only such characters is a symbol
_SYMBOLS = TERMINALS | frozenset(
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～"
    + "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
)


@dataclass(frozen=True)
class Spoken:
    """Holds the words of a text in order: for each word, its hash, its number of characters, whether it is a symbol, and
    whether it has a letter."""

    hash: np.ndarray
    length: np.ndarray
    symbol: np.ndarray
    alphabetic: np.ndarray

    def __len__(self) -> int:
        return len(self.hash)


ROW = Struct("=Qi??")
FACTS = np.dtype([("hash", "=u8"), ("length", "=i4"), ("symbol", "?"), ("alphabetic", "?")])


def hash_of(word: str) -> int:
    return xxhash.xxh64_intdigest(word.encode("utf-8", "surrogatepass"))


class Words:
    """Splits texts into words. Caches the words of each string between white space."""

    def __init__(self) -> None:
        self._recent: dict[str, Spoken] = {}
        self._recent_chars = 0
        self._forget()

    def _forget(self) -> None:
        self._words, self._parts, self._chars = Cache(facts), Cache(self._facts), 0

    def of(self, text: str) -> Spoken:
        known = self._recent.get(text)
        if known is not None:
            return known
        parts = [self._of_slice(part) for part in slices(text)] or [self._of_slice("")]
        spoken = parts[0] if len(parts) == 1 else Spoken(*(np.concatenate(a) for a in zip(*map(_arrays, parts), strict=True)))
        if len(self._recent) >= RECENT_TEXTS or self._recent_chars > RECENT_CHARS:
            self._recent, self._recent_chars = {}, 0
        if len(text) <= RECENT_CHARS:
            self._recent[text] = spoken
            self._recent_chars += len(text)
        return spoken

    def _of_slice(self, text: str) -> Spoken:
        if len(self._words) > MOST_WORDS or self._chars > MOST_CHARS:
            self._forget()
        rows = np.frombuffer(b"".join(map(self._parts.__getitem__, text.split())), FACTS)
        return Spoken(*(rows[name].copy() for name in ("hash", "length", "symbol", "alphabetic")))

    def _facts(self, part: str) -> bytes:
        """Splits a part of a text, and returns the facts about its words."""
        self._chars += len(part)
        return b"".join(map(self._words.__getitem__, tokens(part)))


class Cache(dict[str, bytes]):
    """Caches the results of a function. A look-up of a cached result doesn't call Python code."""

    def __init__(self, function: Callable[[str], bytes]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, string: str) -> bytes:
        result = self[string] = self._function(string)
        return result


def facts(word: str) -> bytes:
    """Returns a row of `FACTS` for a word."""
    letters = word.isalpha()
    return ROW.pack(hash_of(word), len(word), not letters and _SYMBOLS.issuperset(word), letters or any(map(str.isalpha, word)))


def _arrays(spoken: Spoken) -> tuple[np.ndarray, ...]:
    return spoken.hash, spoken.length, spoken.symbol, spoken.alphabetic


shared = Words()  # one per process: a filter reuses the words that an earlier filter split


# sentences: a sentence begins at the first word after a terminal that isn't punctuation
MOST_PARTS, LONG_PART = 1 << 19, 64  # maximum cached parts, and characters of a part that isn't cached
_PLAIN = (0, False, 1, False)  # the counts of a word
_OTHER_SPACE = regex.compile(r"[^\S ]")
_parts: dict[str, tuple[int, bool, int, bool]] = {"": _PLAIN}  # a part that isn't a word may begin a sentence


def sentences(text: str) -> int:
    """Counts the sentences of a text like spaCy's sentencizer. Returns 0 for a text that has only white space."""
    parts = regex.split(r" |([^\S ]\s*)", text) if _OTHER_SPACE.search(text) else text.split(" ")
    if not text or text.isspace():
        return 0
    if len(_parts) > MOST_PARTS:
        _parts.clear()
        _parts[""] = _PLAIN
    count, ended = 1, False
    for part in parts:
        if part is None:
            continue
        effect = _parts.get(part)
        if effect is None:
            effect = _effect(part)
            if len(part) <= LONG_PART:
                _parts[part] = effect
        if ended:
            count += effect[2]
            ended = effect[3]
        else:
            count += effect[0]
            ended = effect[1]
    return count


def _effect(part: str) -> tuple[int, bool, int, bool]:
    """Counts the sentences that begin in a part, and checks whether the part ends a sentence.

    Returns four values: first the count and the check for a part in the middle of a sentence, then both for a part after the end
    of a sentence.
    """
    if part.isalnum() or part.isspace():
        return _PLAIN
    words = tokens(part)
    begun, ended = _run(words, False)
    begun_behind, ended_behind = _run(words, True)
    return begun, ended, begun_behind, ended_behind


def _run(words: tuple[str, ...], ended: bool) -> tuple[int, bool]:
    begun = 0
    for word in words:
        if word in TERMINALS:
            ended = True
        elif ended and not is_punctuation(word):
            begun, ended = begun + 1, False
    return begun, ended


def is_punctuation(word: str) -> bool:
    """Checks whether Unicode classifies all characters of a word as punctuation."""
    return all(unicodedata.category(c)[0] == "P" for c in word)
