"""Finds n-grams of words (`heliostat.curation.comparable`) that texts share with evaluation sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from heliostat.curation.comparable import counted, words
from heliostat.errors import ConfigError


def grams(texts: Sequence[str], n: int) -> list[np.ndarray]:
    """Returns the hashes of each text's word n-grams: one uint64 array per text, in order."""
    hashes, counts = words(texts).ngrams(n)
    return np.split(hashes, np.cumsum(counts))[: len(texts)]


@dataclass(frozen=True)
class NgramIndex:
    """Holds the n-grams of evaluation sets: sorted hashes, and the source of each n-gram, `set#example`."""

    hashes: np.ndarray
    places: np.ndarray  # indexes in `names`
    names: list[str]

    def hits(self, grams: np.ndarray) -> np.ndarray:
        """Returns the indexes in `grams` (hashes of a text's n-grams) of the n-grams that are in an evaluation set."""
        if not len(self.hashes) or not len(grams):
            return np.zeros(0, np.int64)
        at = np.searchsorted(self.hashes, grams).clip(max=len(self.hashes) - 1)
        return np.flatnonzero(self.hashes[at] == grams)

    def name(self, gram: np.uint64) -> str:
        """Returns the source (`set#example`) of an n-gram that is in an evaluation set; the first source, if there are
        several."""
        return self.names[int(self.places[np.searchsorted(self.hashes, gram)])]


def examples(path: str, data: bytes, fields: list[str]) -> Iterator[tuple[int, str]]:
    """Yields (number, text) for each example of an evaluation set. In JSON Lines files, an example's text is the values of the
    given fields (by default, all strings), joined by line breaks. In other files, each paragraph is an example. Raises
    ConfigError if the file can't be parsed."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"sets: {path!r} isn't UTF-8 (byte {e.start:,}). Convert the file to UTF-8") from e
    if not path.endswith((".jsonl", ".json", ".ndjson")):
        yield from enumerate(filter(str.strip, re.split(r"\n\s*\n", text)), 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"sets: {path!r}, line {number:,}: not a JSON object. Write one example per line") from e
        strings = list(_strings({k: record.get(k) for k in fields} if fields and isinstance(record, dict) else record))
        if fields and not strings:
            raise ConfigError(
                f"sets: {path!r}, line {number:,}: none of the fields {', '.join(fields)} is present. "
                "Correct `fields`, or this line"
            )
        yield number, "\n".join(strings)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


EvaluationSets = dict[str, tuple[str, bytes]]
"""Maps the name of each evaluation set to the path and the bytes of its file."""


def short(sets: EvaluationSets, fields: list[str], n: int) -> dict[str, int]:
    """Counts the examples of each set that have fewer than `n` words. Raises ConfigError if no example has more."""
    enough = {
        name: [counted(text) >= n for _, text in examples(path, data, fields)] for name, (path, data) in sorted(sets.items())
    }
    if not any(map(any, enough.values())):
        raise ConfigError(f"sets: no example has {n} words or more. Lower `n`")
    return {name: many for name, long in enough.items() if (many := long.count(False))}


def index(sets: EvaluationSets, fields: list[str], n: int) -> NgramIndex:
    """Builds the n-gram index of evaluation sets."""
    parts, places, names = list[np.ndarray](), list[np.ndarray](), list[str]()
    for name, (path, data) in sorted(sets.items()):
        numbered = list(examples(path, data, fields))
        for (number, _), hashes_of_example in zip(numbered, grams([text for _, text in numbered], n), strict=True):
            names.append(f"{name}#{number}")
            parts.append(hashes_of_example)
            places.append(np.full(len(hashes_of_example), len(names) - 1, np.int32))
    hashes, first = np.unique(np.concatenate(parts), return_index=True)
    return NgramIndex(hashes, np.concatenate(places)[first], names)
