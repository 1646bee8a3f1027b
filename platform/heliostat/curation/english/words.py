"""Splits texts into words. Represents each word by its hash, and by the facts that filters need, such as its number of
characters.

NumPy splits the plain parts of a text (`plain`). Each other string between white space is split once and cached, because most
strings of a text have appeared in earlier texts. Memory is bounded: texts are processed in slices, and the cache is emptied when
it is large. This changes no result.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import regex
import xxhash

from heliostat.curation.comparable import hashed
from heliostat.curation.english import plain
from heliostat.curation.english.marked import marked_words
from heliostat.curation.english.plain import TERMINALS
from heliostat.curation.english.tokens import LONGEST, ODD_CORES, tokens
from heliostat.curation.slices import slices
from heliostat.tasks import spill

MOST_CACHED, MOST_CHARS = 1 << 18, 1 << 23  # maximum cached strings, and characters, before a new group of slices
BLOCK = 1 << 17  # characters of texts that are split at once
RECENT_TEXTS, RECENT_CHARS = 256, 1 << 22  # texts whose words are cached for the next stages


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


FACTS = np.dtype([("hash", "=u8"), ("length", "=i4"), ("symbol", "?"), ("alphabetic", "?")])
NAMES = ("hash", "length", "symbol", "alphabetic")
Columns = tuple[np.ndarray, ...]  # the arrays of Spoken


class Words:
    """Splits texts into words. Caches the words of each string between white space that isn't plain."""

    def __init__(self) -> None:
        self._recent: dict[str, Spoken] = {}
        self._recent_chars = 0
        self._cache: dict[str, bytes] = {}
        self._chars = 0

    def of(self, text: str) -> Spoken:
        return self.of_all([text])[0]

    def of_all(self, texts: Sequence[str]) -> list[Spoken]:
        """Splits several texts at once, which is faster than one after another."""
        spoken = {text: known for text in texts if (known := self._recent.get(text)) is not None}
        new = [text for text in dict.fromkeys(texts) if text not in spoken]
        spoken |= zip(new, self._split(new), strict=True)
        small = [text for text in new if len(text) <= RECENT_CHARS]
        if len(self._recent) + len(small) > RECENT_TEXTS or self._recent_chars > RECENT_CHARS:
            self._recent, self._recent_chars = {}, 0
        self._recent |= ((text, spoken[text]) for text in small)
        self._recent_chars += sum(map(len, small))
        return [spoken[text] for text in texts]

    def _split(self, texts: list[str]) -> Iterator[Spoken]:
        numbers, counts, columns = list[int](), [np.zeros(0, np.int64)], [_columns(0)]
        for group in _groups((number, part) for number, text in enumerate(texts) for part in slices(text)):
            numbers += [number for number, _ in group]
            some, count = self._of_group([part for _, part in group])
            columns.append(some)
            counts.append(count)
        sizes = np.bincount(numbers, np.concatenate(counts), len(texts)).astype(np.int64)
        joined = [np.concatenate(some) for some in zip(*columns, strict=True)]
        return (Spoken(*(column[a:b] for column in joined)) for a, b in pairwise([0, *np.cumsum(sizes).tolist()]))

    def _of_group(self, group: list[str]) -> tuple[Columns, np.ndarray]:
        """Splits slices of texts. Returns the columns of `Spoken` for all words, and the number of words in each slice."""
        if len(self._cache) > MOST_CACHED or self._chars > MOST_CHARS:
            self._cache, self._chars = {}, 0
        text = "\n".join(group)
        codes, kinds = plain.looked_up(text)
        parts = plain.parts(codes, kinds)
        which, split = np.flatnonzero(parts.plain), parts.plain.copy()
        short = np.flatnonzero(~split & (parts.stops - parts.starts <= plain.LONGEST_PLAIN))
        marked = marked_words(codes, parts.starts[short], parts.stops[short])
        of_marked = short[marked.split]
        split[of_marked] = True
        other = np.flatnonzero(~split)
        rows = self._rows([text[a:b] for a, b in zip(parts.starts[other].tolist(), parts.stops[other].tolist(), strict=True)])
        others = np.fromiter(map(len, rows), np.int64, len(rows)) // FACTS.itemsize
        counts = 1 + parts.before.astype(np.int64) + parts.after
        counts[of_marked], counts[other] = marked.counts, others
        firsts = np.concatenate([[0], np.cumsum(counts)])  # index of each part's first word
        columns = _columns(firsts[-1])
        sizes = parts.stops - parts.starts - parts.before - parts.after
        symbols = (kinds[(parts.starts + parts.before)[which]] & plain.SYMBOL) != 0  # only a single character
        _put(columns, (firsts[:-1] + parts.before)[which], parts.hashes[which], sizes[which], symbols, parts.letters[which])
        before, after = which[parts.before[which]], which[parts.after[which]]
        for places, marks in ((firsts[before], parts.starts[before]), (firsts[after + 1] - 1, parts.stops[after] - 1)):
            _put(columns, places, spill.mixed(codes[marks]), 1, (kinds[marks] & plain.SYMBOL) != 0, False)
        kinds = kinds.take(marked.places, mode="clip")
        of_words = _facts(kinds, marked.starts, marked.stops, marked.hashes), np.frombuffer(b"".join(rows), FACTS)
        for firsts_of, some, rows_of in zip((firsts[of_marked], firsts[other]), (marked.counts, others), of_words, strict=True):
            _put(columns, _spread(firsts_of, some), *(rows_of[name] for name in NAMES))
        ends = np.fromiter(accumulate(len(part) + 1 for part in group), np.int64, len(group))
        return columns, np.diff(firsts[np.searchsorted(parts.starts, ends)], prepend=0)

    def _rows(self, parts: list[str]) -> list[bytes]:
        """Returns the facts about the words of each part, as bytes of `FACTS`."""
        if new := [part for part in dict.fromkeys(parts) if part not in self._cache]:
            words = list(map(tokens, new))
            data = facts([word for some in words for word in some]).tobytes()
            ends = [end * FACTS.itemsize for end in accumulate(map(len, words), initial=0)]
            self._cache |= ((part, data[a:b]) for part, (a, b) in zip(new, pairwise(ends), strict=True))
            self._chars += sum(map(len, new))
        return list(map(self._cache.__getitem__, parts))


def _groups(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Groups slices of texts that are processed at once."""
    group, size = list[tuple[int, str]](), 0
    for number, part in parts:
        group.append((number, part))
        size += len(part)
        if size >= BLOCK:
            yield group
            group, size = [], 0
    if group:
        yield group


def _columns(words: int) -> Columns:
    return tuple(np.empty(words, FACTS[name]) for name in NAMES)


def _put(columns: Columns, places: np.ndarray, *values: np.ndarray | bool | int) -> None:
    for column, value in zip(columns, values, strict=True):
        column[places] = value


def _spread(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the indices of words: `counts[i]` consecutive indices from `firsts[i]` on."""
    return np.repeat(firsts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def facts(words: list[str]) -> np.ndarray:
    """Returns a row of `FACTS` for each word."""
    codes, kinds = plain.looked_up("".join(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    stops, hashes = np.cumsum(lengths), np.empty(len(words), np.uint64)
    starts, short = stops - lengths, lengths <= plain.LONGEST_PLAIN
    hashes[short] = hashed(codes, starts[short], stops[short])
    for number in np.flatnonzero(~short).tolist():
        hashes[number] = xxhash.xxh64_intdigest(words[number].encode("utf-8", "surrogatepass"))
    return _facts(kinds, starts, stops, hashes)


def _facts(kinds: np.ndarray, starts: np.ndarray, stops: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    rows, lengths = np.empty(len(starts), FACTS), stops - starts
    letters, symbols = (
        np.diff(np.concatenate([[0], np.cumsum((kinds & bit) != 0, dtype=np.int32)])[[starts, stops]], axis=0)[0]
        for bit in (plain.LETTER, plain.SYMBOL)
    )
    rows["hash"], rows["length"], rows["symbol"], rows["alphabetic"] = hashes, lengths, symbols == lengths, letters > 0
    return rows


shared = Words()  # one per process: a filter reuses the words that an earlier filter split


# sentences: a sentence begins at the first word after a terminal that isn't punctuation
MOST_PARTS, LONG_PART = 1 << 19, 64  # maximum cached parts, and characters of a part that isn't cached
_PLAIN = (0, False, 1, False)  # the counts of a word
_WORD_AND_TERMINAL = (0, True, 1, True)
_TERMINAL = re.compile(f"[{re.escape(''.join(sorted(TERMINALS)))}]")
# also finds every character after U+FFFF, because a pattern with only one range of these is faster
_PERHAPS_TERMINAL = re.compile(f"[{re.escape(''.join(sorted(c for c in TERMINALS if c < chr(1 << 16))))}\U00010000-\U0010ffff]")
_OTHER_SPACE = regex.compile(r"[^\S ]")
_parts: dict[str, tuple[int, bool, int, bool]] = {"": _PLAIN}  # a part that isn't a word may begin a sentence


def sentences(text: str) -> int:
    """Counts the sentences of a text like spaCy's sentencizer. Returns 0 for a text that has only white space."""
    first = _PERHAPS_TERMINAL.search(text)
    if first is None:
        return int(bool(text) and not text.isspace())
    text = text[text.rfind(" ", 0, first.start()) + 1 :]  # no sentence ends before this part
    plain_spaces = text.isprintable() or not _OTHER_SPACE.search(text)  # no other white space is printable
    parts = text.split(" ") if plain_spaces else regex.split(r" |([^\S ]\s*)", text)
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
    if _PERHAPS_TERMINAL.search(part) is None or _TERMINAL.search(part) is None:
        ended = not part[0].isalnum() and is_punctuation(part)
        return 0, False, int(not ended), ended
    core, mark = part[:-1], part[-1]
    if core.isalpha() and core not in ODD_CORES and (mark in "!?" or (mark == "." and "a" <= core[-1] <= "z")):
        return _WORD_AND_TERMINAL if len(part) <= LONGEST else _PLAIN
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
    """Checks whether Unicode classifies all characters of a string as punctuation."""
    return all(unicodedata.category(c)[0] == "P" for c in word)
