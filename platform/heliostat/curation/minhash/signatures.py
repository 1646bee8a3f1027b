"""Computes the keys that near-duplicates share: MinHash signatures of a text's n-grams, split into bands.

Two texts whose sets of n-grams have the Jaccard similarity s agree in a band of r rows with probability s^r. So the texts share
at least one of b keys with probability 1 - (1 - s^r)^b. (Broder, On the resemblance and containment of documents, 1997; the
bands: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from heliostat.curation.comparable import FACTOR, words
from heliostat.curation.segment import SpilledRun, survivors
from heliostat.storage.locations import Location
from heliostat.tasks import spill

VALUES = 1 << 18  # values of signatures that are computed at once, because each is a Python integer for a moment


@dataclass(frozen=True)
class Parameters:
    """Defines the parameters of MinHash signatures: `bands` x `rows` permutations of the n-grams of words."""

    bands: int
    rows: int
    ngram: int
    seed: int
    within: str = ""
    """Column that limits comparisons to documents with the same value."""


def keys(texts: list[str], parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Computes the keys of each text that has words. Returns (keys: uint64 [texts, bands], indexes of these texts)."""
    from rensa import RMinHash  # imported when a pipeline needs it

    hashes, counts = words(texts).ngrams(parameters.ngram, short=True)
    which = np.flatnonzero(counts)
    if not len(which):
        return np.zeros((0, parameters.bands), np.uint64), which
    offsets = np.concatenate([[0], np.cumsum(counts[which])]).astype(np.uint64)
    permutations = parameters.bands * parameters.rows
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, permutations, parameters.seed)
    return banded(np.array(matrix.to_rows(), np.uint64), parameters), which


def banded(signatures: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Hashes each band of each signature, together with the band's number, to 64 bits. Returns uint64 [texts, bands]."""
    bands = np.empty((len(signatures), parameters.bands), np.uint64)
    with np.errstate(over="ignore"):
        for band in range(parameters.bands):
            h = np.full(len(signatures), band + 1, np.uint64)
            for row in range(parameters.rows):
                h = spill.mixed(h * FACTOR + signatures[:, band * parameters.rows + row])
            bands[:, band] = h
    return bands


def sign(folder: Location, run: SpilledRun, parameters: Parameters) -> dict[str, object]:
    """Writes pairs (key, row) to a temporary file, for the documents of `run` except copies. A copy is a document with the same
    keys as an earlier document. Writes the row of each copy, and the row of the earlier document, to a second temporary file.

    A copy has the same candidates as the earlier document, so heliostat doesn't compare the copy again.
    """
    bands, rows = [np.zeros((0, parameters.bands), np.uint64)], [np.zeros(0, np.uint32)]
    each = max(1, VALUES // (parameters.bands * parameters.rows))
    for whole in survivors(folder, run, columns=["text", *(["columns"] if parameters.within else [])]):
        for table in (whole.slice(first, each) for first in range(0, len(whole), each)):
            signatures, which = _keys_of(table, parameters)
            bands.append(signatures)
            rows.append(table["row"].to_numpy()[which])
    signed, row = np.concatenate(bands), np.concatenate(rows)
    first, group = np.unique(signed, axis=0, return_index=True, return_inverse=True)[1:]
    copies = np.flatnonzero(first[group.ravel()] != np.arange(len(row)))
    of = row[first[group.ravel()[copies]]]
    keys = pa.table({"key": signed[first].ravel(), "row": np.repeat(row[first], parameters.bands)})
    names = [spill.write(folder, keys, ("row",))]
    if len(copies):
        names.append(spill.write(folder, pa.table({"key": row[copies].astype(np.uint64), "first": of})))
    return {"keys": names[0], "copies": names[1] if len(copies) else None, "rows": len(keys), "files": names}


def _keys_of(table: pa.Table, parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Computes the keys of a table's documents, once per distinct text. Documents with different values in the column `within`
    have different keys. Returns uint64 [documents, bands], and the indexes of the documents that have words."""
    texts = table["text"].to_pylist()
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    hashes, having = keys(list(numbers), parameters)
    place = np.full(len(numbers), -1)
    place[having] = np.arange(len(having))
    places = place[[numbers[text] for text in texts]]
    which = np.flatnonzero(places >= 0)
    hashes = hashes[places[which]]
    if parameters.within:
        columns_of = table["columns"].take(pa.array(which)).to_pylist()
        values = [json.dumps(json.loads(columns or "{}").get(parameters.within), sort_keys=True) for columns in columns_of]
        hashes = spill.mixed(hashes ^ np.array([xxhash.xxh64_intdigest(value.encode()) for value in values], np.uint64)[:, None])
    return hashes, which
