"""Splits texts into English words. Represents each word by its hash, and by the facts that filters need, such as its number of
characters."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from heliostat.curation.compiled import compiled
from heliostat.curation.english import characters
from heliostat.curation.english.characters import ALPHABETIC, SPACE, SYMBOL, code_points
from heliostat.curation.english.parts import CODE_BITS, FACTOR, PAIR, SEQUENCE, UNIT, hash_of, kind_of, mixed, scratch
from heliostat.curation.english.rules import EXCEPTIONS, LONGEST, UNITS
from heliostat.curation.english.splitting import exception, split

BLOCK = 1 << 16  # words that are split at once
# maximum texts whose words stay in memory, and their characters; twice a batch's (`curation.chain`)
REMEMBERED, REMEMBERED_CHARS = 128, 1 << 21
IS_SYMBOL, HAS_LETTER = 1, 2  # facts about a word, as bits


class Spoken(NamedTuple):
    """Holds the words of a text in order: for each word, its hash, its number of characters, and its facts: IS_SYMBOL,
    HAS_LETTER."""

    hashes: np.ndarray
    lengths: np.ndarray
    facts: np.ndarray


def spoken(codes: np.ndarray) -> Spoken:
    """Splits a text into words. `codes`: the text's code points."""
    return _by_rules(codes, rules())


class RecentWords:
    """Remembers the words of the last texts, because the filters of a pipeline split the same texts one after another."""

    def __init__(self) -> None:
        self._words, self._chars = dict[str, Spoken](), 0

    def spoken(self, text: str, codes: np.ndarray) -> Spoken:
        """Returns the words of a text. `codes`: the text's code points."""
        if (known := self._words.get(text)) is not None:
            return known
        words = Spoken(*(values.copy() for values in spoken(codes)))  # not views of arrays that have room for every character
        if len(self._words) == REMEMBERED or self._chars + len(text) > REMEMBERED_CHARS:
            self._words, self._chars = {}, 0
        if len(text) <= REMEMBERED_CHARS:
            self._words[text], self._chars = words, self._chars + len(text)
        return words


recent = RecentWords()


def _by_rules(codes: np.ndarray, table: np.ndarray) -> Spoken:
    parts, at = list[Spoken](), 0
    while True:
        room = min(len(codes) - at, BLOCK) + LONGEST
        words = np.empty(room, np.uint64), np.empty(room, np.int32), np.empty(room, np.uint8)
        at, count = _words(codes, at, characters.kinds(), powers(), table, *words)
        parts.append(Spoken(*(values[:count] for values in words)))
        if at == len(codes):
            return parts[0] if len(parts) == 1 else Spoken(*map(np.concatenate, zip(*parts, strict=True)))


@compiled
def hashed(codes: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Returns a hash for each string between white space."""
    hashes, count, total = np.empty(len(codes), np.uint64), 0, np.uint64(0)
    for code in codes:
        if not kind_of(kinds, code) & SPACE:
            total = total * FACTOR + np.uint64(code) + np.uint64(1)
        elif total:
            hashes[count], total = mixed(total), np.uint64(0)
            count += 1
    return hashes[:count]


@compiled
def _words(
    codes: np.ndarray, at: int, kinds: np.ndarray, powers: np.ndarray, table: np.ndarray, hashes: np.ndarray,
    lengths: np.ndarray, facts: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Writes the words from a position on to the arrays, until these are full. Returns the next position, and the number of
    words."""
    chars, sums, firsts = scratch(powers)
    count, size, room = 0, len(codes), len(hashes) - LONGEST
    while at < size and count < room:
        kind = kind_of(kinds, codes[at])
        if kind & SPACE:
            at += 1
            continue
        begin, total, every, some = at, np.uint64(0), kind, kind
        while True:
            code = codes[at]
            total = total * FACTOR + np.uint64(code) + np.uint64(1)
            if at - begin < LONGEST:
                chars[at - begin], sums[0, at - begin + 1] = kind << CODE_BITS | np.int64(code), total
            at += 1
            if at == size:
                break
            kind = kind_of(kinds, codes[at])
            if kind & SPACE:
                break
            every &= kind
            some |= kind
        length, words = at - begin, 1
        if 1 < length <= LONGEST and not (every & ALPHABETIC and not exception(sums, table, 0, length)):
            words = split(chars, sums, table, firsts, length)
        if words == 1:
            hashes[count], lengths[count], facts[count] = mixed(total), length, _facts(every, some)
            count += 1
            continue
        for word in range(words):
            first, last = firsts[word], firsts[word + 1]
            every = some = chars[first] >> CODE_BITS
            for character in range(first + 1, last):
                every &= chars[character] >> CODE_BITS
                some |= chars[character] >> CODE_BITS
            hashes[count], lengths[count], facts[count] = hash_of(sums, first, last), last - first, _facts(every, some)
            count += 1
    return at, count


@compiled
def _facts(every: int, some: int) -> int:
    return (IS_SYMBOL if every & SYMBOL else 0) | (HAS_LETTER if some & ALPHABETIC else 0)


def hashes_of(words: Iterable[str]) -> list[int]:
    """Returns the hashes of words."""
    return hashed(code_points("".join(f"{word} " for word in words)), characters.kinds()).tolist()


@lru_cache(maxsize=1)
def powers() -> np.ndarray:
    """Returns the powers of FACTOR, uint64 [LONGEST + 1]."""
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(LONGEST, FACTOR)]), dtype=np.uint64)


@lru_cache(maxsize=1)
def rules() -> np.ndarray:
    """Builds the table of known hashes. The rules split some exceptions, which are joined again, in longer strings, too."""
    sizes = [sum(len(word) << 4 * place for place, word in enumerate(words)) for words in EXCEPTIONS.values()]
    values = dict(zip(hashes_of(EXCEPTIONS), sizes, strict=True)) | {key ^ int(UNIT): 1 for key in hashes_of(UNITS)}
    units = _table({key ^ int(UNIT): 1 for key in hashes_of(UNITS)})
    split_again = _by_rules(code_points(" ".join(EXCEPTIONS)), units)
    words = zip(split_again.hashes.tolist(), split_again.lengths.tolist(), strict=True)
    for whole, value in zip(EXCEPTIONS, sizes, strict=True):
        (key, length), count = next(words), 1
        while length < len(whole):
            other, more = next(words)
            key, length, count = int(mixed(np.uint64((key * int(FACTOR) + other) % (1 << 64)))), length + more, count + 1
            if count == 2:
                values[key ^ int(PAIR)] = 1
        if count > 1:
            values[key ^ int(SEQUENCE)] = value
    return _table(values)


def _table(values: dict[int, int]) -> np.ndarray:
    """Builds a table of hashes for `value_of`."""
    table = np.zeros((1 << (4 * len(values)).bit_length(), 2), np.uint64)
    for key, value in values.items():
        at = key % len(table)
        while table[at, 0]:
            at = (at + 1) % len(table)
        table[at] = key, value
    return table
