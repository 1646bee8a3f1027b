"""Computes the keys under which near duplicates meet: MinHash signatures of a text's n-grams, cut into bands.

Two texts whose sets of n-grams have the Jaccard similarity s agree in a band of r rows with probability s^r, and so meet under at
least one of b keys with probability 1 - (1 - s^r)^b. (Broder, On the resemblance and containment of documents, 1997; the cut into
bands: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from heliostat.curation import spill
from heliostat.curation.segment import Run, survivors
from heliostat.storage import Location

IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f"  # of languages that put no spaces between words: each is one
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]+")
IN_WORD = np.array([chr(b).isalnum() or b == ord("_") or b > 127 for b in range(256)])  # bytes of UTF-8
BLOCK = 1 << 20  # bytes whose words are hashed together
VALUES = 1 << 18  # of signatures that are made together, each a Python integer for a moment
FACTOR = np.uint64(0x9E3779B97F4A7C15)
INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))


@dataclass(frozen=True)
class Parameters:
    """Defines signatures: `bands` x `rows` permutations of the n-grams of words."""

    bands: int
    rows: int
    ngram: int
    seed: int


def words(text: str) -> bytes:
    """Returns a text in lower case as UTF-8, in which words are what stands between bytes that are not IN_WORD."""
    text = text.lower()
    return (text if text.isascii() else " ".join(WORD.findall(text))).encode()


def hashes(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Hashes each word of `words`; returns (where they begin, their hashes: the same wherever a word stands)."""
    starts, found, begin = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)], 0
    while begin < len(data):
        end = begin + BLOCK
        while end < len(data) and IN_WORD[data[end]]:  # not within a word
            end += 1
        block = np.frombuffer(data, np.uint8, min(end, len(data)) - begin, begin)
        inside = np.concatenate([[False], IN_WORD[block], [False]])
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        starts.append(edges[::2] + begin)
        found.append(_hashed(block, edges[::2], edges[1::2]))
        begin = end
    return np.concatenate(starts), np.concatenate(found)


def _hashed(block: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Hashes parts of a block: polynomials of their bytes, taken from sums over the block, whose powers are divided out."""
    powers = np.full(len(block) + 1, FACTOR)
    powers[0] = 1
    inverse = np.full(len(block) + 1, INVERSE)
    inverse[0] = 1
    with np.errstate(over="ignore"):
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(block * np.cumprod(powers)[:-1])])
        return spill.mixed((sums[stops] - sums[starts]) * np.cumprod(inverse)[starts])


def shingles(found: np.ndarray, counts: np.ndarray, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes every n-gram of texts with so many words each; returns (hashes, how many each text has).

    A text that is shorter is a single n-gram, one without words has none.
    """
    ends = np.cumsum(counts)
    left = np.repeat(ends, counts) - np.arange(len(found))  # words from each to its text's end
    made, padded = np.zeros(len(found), np.uint64), np.concatenate([found, np.zeros(ngram, np.uint64)])
    factor = np.uint64(1)
    with np.errstate(over="ignore"):
        for i in range(ngram):
            made += np.where(left > i, padded[i : i + len(found)], np.uint64(0)) * factor
            factor *= FACTOR
    firsts = np.repeat(ends - counts, counts) == np.arange(len(found))
    return spill.mixed(made[(left >= ngram) | firsts]), np.where(counts > 0, np.maximum(1, counts - ngram + 1), 0)


def keys(texts: list[str], parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Computes (the keys of each text with words: texts x bands, uint64; which texts these are)."""
    from rensa import RMinHash  # when a pipeline asks for it

    cleaned = [words(text) for text in texts]
    starts, found = hashes(b" ".join(cleaned))
    edges = np.cumsum([0, *(len(c) + 1 for c in cleaned)])
    made, counts = shingles(found, np.diff(np.searchsorted(starts, edges)), parameters.ngram)
    which = np.flatnonzero(counts)
    if not len(which):
        return np.zeros((0, parameters.bands), np.uint64), which
    offsets = np.concatenate([[0], np.cumsum(counts[which])]).astype(np.uint64)
    permutations = parameters.bands * parameters.rows
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(made, offsets, permutations, parameters.seed)
    return banded(np.array(matrix.to_rows(), np.uint64), parameters), which


def banded(signatures: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Hashes each band of each signature, with its number, to 64 bits."""
    made = np.empty((len(signatures), parameters.bands), np.uint64)
    with np.errstate(over="ignore"):
        for band in range(parameters.bands):
            h = np.full(len(signatures), band + 1, np.uint64)
            for row in range(parameters.rows):
                h = spill.mixed(h * FACTOR + signatures[:, band * parameters.rows + row])
            made[:, band] = h
    return made


def sign(folder: Location, run: Run, parameters: Parameters) -> dict[str, Any]:
    """Spills the keys of a run's documents: (key, row)."""
    found, rows, each = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)], max(1, VALUES // (parameters.bands * parameters.rows))
    for whole in survivors(folder, run, columns=["text"]):
        for table in (whole.slice(first, each) for first in range(0, len(whole), each)):
            made, which = keys(table["text"].to_pylist(), parameters)
            found.append(made.ravel())
            rows.append(np.repeat(table["row"].to_numpy()[which], parameters.bands))
    table = pa.table({"key": np.concatenate(found), "row": np.concatenate(rows)})
    name = spill.write(folder, table, ("row",))
    return {"keys": name, "rows": len(table), "files": [name]}
