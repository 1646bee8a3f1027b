"""Finds n-grams of words that texts share with evaluation sets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from heliostat.errors import ConfigError

_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
MOST_WORDS, LONG_WORD = 1 << 20, 64  # whose hashes are remembered, and the characters of one whose is not


def words(text: str) -> Iterator[re.Match[str]]:
    """Finds the words that are compared: runs of letters and digits."""
    return _WORD.finditer(text)


class Hashes:
    """Computes hashes of words, in small letters, and of n-grams of them."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._known: dict[str, int] = {}

    def _word(self, word: str) -> int:
        found = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if len(word) <= LONG_WORD:
            self._known[word] = found
        return found

    def grams(self, text: str) -> np.ndarray:
        """Returns the hash of each n-gram of the text's words, in their order."""
        if len(self._known) > MOST_WORDS:
            self._known.clear()
        known = self._known
        found = np.array([known[w] if w in known else self._word(w) for w in _WORD.findall(text.lower())], np.uint64)
        count = len(found) - self.n + 1
        if count <= 0:
            return np.zeros(0, np.uint64)
        out = found[:count].copy()
        for i in range(1, self.n):
            out = out * _FACTOR + found[i : i + count]
            out ^= out >> np.uint64(31)
        return out


@dataclass(frozen=True)
class Index:
    """Holds the n-grams of evaluation sets: sorted hashes, and the place of each, `set#example`."""

    hashes: np.ndarray
    places: np.ndarray  # numbers into names
    names: list[str]

    def hits(self, grams: np.ndarray) -> np.ndarray:
        """Returns the positions of a text's n-grams that are in an evaluation set."""
        if not len(self.hashes) or not len(grams):
            return np.zeros(0, np.int64)
        at = np.searchsorted(self.hashes, grams).clip(max=len(self.hashes) - 1)
        return np.flatnonzero(self.hashes[at] == grams)

    def name(self, gram: np.uint64) -> str:
        """Returns the place of an n-gram that is a hit: the first, if there are several."""
        return self.names[int(self.places[np.searchsorted(self.hashes, gram)])]


def examples(path: str, data: bytes, fields: list[str]) -> Iterator[tuple[int, str]]:
    """Yields the numbered texts of an evaluation set: of JSON lines, the fields (all strings, if none is named), joined
    by line ends; of any other file, paragraphs. ConfigError if it cannot be read."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"sets: {path!r} is not UTF-8 (byte {e.start:,}); convert it") from e
    if not path.endswith((".jsonl", ".json", ".ndjson")):
        yield from enumerate(filter(str.strip, re.split(r"\n\s*\n", text)), 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"sets: {path!r}, line {number:,} is no JSON object; give one example a line") from e
        found = list(_strings({k: record.get(k) for k in fields} if fields and isinstance(record, dict) else record))
        if fields and not found:
            raise ConfigError(f"sets: {path!r}, line {number:,} has none of the fields {', '.join(fields)}")
        yield number, "\n".join(found)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def index(sets: dict[str, tuple[str, bytes]], fields: list[str], n: int) -> tuple[Index, dict[str, int]]:
    """Builds the index of named sets (their path and bytes); also counts the examples that are too short to have an n-gram."""
    hashes, parts, places, names, short = Hashes(n), list[np.ndarray](), list[np.ndarray](), list[str](), dict[str, int]()
    for name, (path, data) in sorted(sets.items()):
        for number, text in examples(path, data, fields):
            grams = hashes.grams(text)
            if not len(grams):
                short[name] = short.get(name, 0) + 1
                continue
            names.append(f"{name}#{number}")
            parts.append(grams)
            places.append(np.full(len(grams), len(names) - 1, np.int32))
    if not parts:
        raise ConfigError(f"sets: no example has {n} words; lower `n`")
    found, first = np.unique(np.concatenate(parts), return_index=True)
    return Index(found, np.concatenate(places)[first], names), short
