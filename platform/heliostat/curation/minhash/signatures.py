"""Computes the keys that near-duplicates share: MinHash signatures of a text's n-grams, split into bands.

Two texts whose sets of n-grams have the Jaccard similarity s agree in a band of r rows with probability s^r. So the texts share
at least one of b keys with probability 1 - (1 - s^r)^b. (Broder, On the resemblance and containment of documents, 1997; the
bands: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from heliostat.curation.comparable import FACTOR, has_word, words
from heliostat.curation.minhash import exact
from heliostat.curation.minhash.keep import ABOUT
from heliostat.curation.segment import SpilledRun, survivors
from heliostat.storage.locations import Location
from heliostat.tasks import spill

ABOUT_BYTES = 8 << 20  # bytes of the columns ABOUT above which `sign` doesn't copy them
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


def sign(folder: Location, run: SpilledRun, parameters: Parameters, repeated: str | None = None) -> dict[str, object]:
    """Writes pairs (key, row) to a temporary file, for the documents of `run` except copies. A copy has the same text or the same
    keys as an earlier document. Writes the row of each copy, and the row of the earlier document, to a second temporary file.

    A copy has the same candidates as the earlier document, so heliostat doesn't compare the copy again. `repeated`: the file that
    lists the documents whose text other runs have, too (`exact.copies`). Such a document gets one more key, which all documents
    with the text share. If another run signs the text, this key is the document's only key.

    Also writes the ids, bytes, and columns of all documents to a temporary file (`about`), unless they are large. So the search
    for candidates doesn't read the texts.
    """
    shared, shared_keys, copied = exact.read(folder, repeated)
    none = np.zeros(0, np.uint32)
    elsewhere, all_rows, firsts, worded, signed_rows = shared[copied], [none], [none], [none], [none]
    bands, each = [np.zeros((0, parameters.bands), np.uint64)], max(1, VALUES // (parameters.bands * parameters.rows))
    about, size = list[pa.Table](), 0
    tables = survivors(folder, run, columns=["hash", "text", *ABOUT])
    for whole, _, first_rows in exact.with_first(tables, parameters.within):
        if size <= ABOUT_BYTES:
            about.append(whole.select(["key", "row", *ABOUT]))
            size += about[-1].nbytes
        all_rows.append(whole["row"].to_numpy())
        firsts.append(first_rows)
        table = whole.filter(pa.array(first_rows == all_rows[-1]))
        away = np.isin(table["row"].to_numpy(), elsewhere)
        having = [has_word(text) for text in table["text"].filter(pa.array(away)).to_pylist()]
        worded.append(table["row"].to_numpy()[away][having])
        table = table.filter(pa.array(~away))
        for part in (table.slice(at, each) for at in range(0, len(table), each)):
            signatures, which = _keys_of(part, parameters)
            bands.append(signatures)
            signed_rows.append(part["row"].to_numpy()[which])
    rows, first, signed, having_keys = (np.concatenate(parts) for parts in (all_rows, firsts, bands, signed_rows))
    at, group = np.unique(signed, axis=0, return_index=True, return_inverse=True)[1:]
    stands = np.full(int(rows.max(initial=0)) + 1, -1, np.int64)  # the row that has the keys of a row, -1 for a row without words
    for words_elsewhere in worded:
        stands[words_elsewhere] = words_elsewhere
    stands[having_keys] = having_keys[at[group.ravel()]]
    of, of_shared = stands[first], stands[shared]
    copies = (of >= 0) & (of != rows)
    key = np.concatenate([signed[at].ravel(), shared_keys[of_shared >= 0]])
    keyed = np.concatenate([np.repeat(having_keys[at], parameters.bands), of_shared[of_shared >= 0].astype(np.uint32)])
    names = [spill.write(folder, pa.table({"key": key, "row": keyed}), ("row",))]
    if copies.any():
        of_copies = pa.table({"key": rows[copies].astype(np.uint64), "first": of[copies].astype(np.uint32)})
        names.append(spill.write(folder, of_copies))
    copies_name = names[1] if copies.any() else None
    if about and size <= ABOUT_BYTES:
        names.append(spill.write_sorted(folder, pa.concat_tables(about)))
    return {
        "keys": names[0],
        "copies": copies_name,
        "about": names[-1] if about and size <= ABOUT_BYTES else None,
        "rows": len(key),
        "signed": int((first == rows).sum()) - len(elsewhere),
        "files": names,
    }


def _keys_of(table: pa.Table, parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Computes the keys of a table's documents. Documents with different values in the column `within` have different keys.
    Returns uint64 [documents, bands], and the indexes of the documents that have words."""
    hashes, which = keys(table["text"].to_pylist(), parameters)
    if parameters.within:
        hashes = spill.mixed(hashes ^ exact.within_of(table, parameters.within)[which, None])
    return hashes, which
