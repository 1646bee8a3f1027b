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
ASCII_WORD, WORD = re.compile(r"[a-z0-9_]+"), re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Parameters:
    """Defines signatures: `bands` x `rows` permutations of the n-grams of words."""

    bands: int
    rows: int
    ngram: int
    seed: int


def words(text: str) -> list[str]:
    """Splits a text into words in lower case, without punctuation."""
    text = text.lower()
    return ASCII_WORD.findall(text) if text.isascii() else WORD.findall(text)


def shingles(hashes: np.ndarray, ngram: int) -> np.ndarray:
    """Hashes every n-gram of a text's word hashes; one that is shorter is a single n-gram, one without words has none."""
    n = min(ngram, len(hashes))
    if n == 0:
        return hashes
    made = np.zeros(len(hashes) - n + 1, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(n):
            made = spill.mixed(made * FACTOR + hashes[i : len(hashes) - n + 1 + i])
    return np.unique(made)


def keys(texts: list[str], parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Computes (the keys of each text with words: texts x bands, uint64; which texts these are)."""
    from rensa import RMinHash  # when a pipeline asks for it

    made = [shingles(np.array(h, np.uint64), parameters.ngram) for h in RMinHash.hash_token_sets([words(t) for t in texts])]
    which = np.array([i for i, s in enumerate(made) if len(s)], np.int64)
    if not len(which):
        return np.zeros((0, parameters.bands), np.uint64), which
    offsets = np.concatenate([[0], np.cumsum([len(made[i]) for i in which])]).astype(np.uint64)
    flat, permutations = np.concatenate([made[i] for i in which]), parameters.bands * parameters.rows
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, permutations, parameters.seed)
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
    found, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
    for table in survivors(folder, run, columns=["text"]):
        made, which = keys(table["text"].to_pylist(), parameters)
        found.append(made.ravel())
        rows.append(np.repeat(table["row"].to_numpy()[which], parameters.bands))
    table = pa.table({"key": np.concatenate(found), "row": np.concatenate(rows)})
    name = spill.write(folder, table, ("row",))
    return {"keys": name, "rows": len(table), "files": [name]}
