"""Splits samples into training and held-out ones: a pure function of each chunk's content, whatever the seed or the other chunks.

A document lies in one chunk, or in chunks of one place, so chunks that are held out whole hold out whole documents. Each chunk
has a place between 0 and 1; those below `evaluate.fraction` are held out. So what a fraction holds out is held out at every
larger one too, and at any sequence length. The place is the greatest of the chunk's documents (by hash of their text) where the
manifest knows it; `prepare` ends a chunk at 1, 2 and 5 parts of ten, a hundred and so on, so there exactly the documents below
the fraction are held out. Else the place is a hash of the chunk's content digest and number.

Rows are samples, and a chunk of them need not be held out whole where no hash of them is known: then it gives a run of rows
that starts at a hashed place, grows with the fraction, and continues with the chunk's first row behind its last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from heliostat.data import mapped
from heliostat.data.manifest import PLACES, Manifest

NEWEST = 2  # of the split and the order; recorded in the data plan


def hash64(values: np.ndarray) -> np.ndarray:
    """Computes SplitMix64's finaliser (Steele et al. 2014), uint64 to uint64: spreads counters and digests evenly."""
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Split:
    """Divides a source's chunks into training and held-out samples.

    In each chunk a run of `held` rows from `start` is held out, which continues at row 0 behind the chunk's last.
    """

    samples: np.ndarray  # int64 [chunks], all samples
    held: np.ndarray  # int64 [chunks]
    start: np.ndarray  # int64 [chunks]

    @property
    def train(self) -> np.ndarray:
        return self.samples - self.held

    @property
    def trained(self) -> int:
        """Counts the training samples of all chunks."""
        return int(self.samples.sum()) - int(self.held.sum())

    def train_rows(self, chunk: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Maps numbers of the chunks' training samples to their rows."""
        samples, held_rows, start = self.samples[chunk], self.held[chunk], self.start[chunk]
        row = number + np.maximum(start + held_rows - samples, 0)
        return np.where(row >= start, row + held_rows, row)

    def held_rows(self, chunk: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Maps numbers of the chunks' held-out samples to their rows."""
        return (self.start[chunk] + number) % self.samples[chunk]


def split(source: Manifest, sequence_length: int | None, fraction: float, version: int = NEWEST) -> Split:
    """Splits a dataset into training and held-out samples by the rules of a version of the data plan."""
    if len(source.chunks) < mapped.LARGE:
        return _split(source, sequence_length, fraction, version)

    def build() -> pa.Table:
        divided = _split(source, sequence_length, fraction, version)
        return pa.table({"samples": divided.samples, "held": divided.held, "start": divided.start})

    shared = mapped.table(["split", source.digest, sequence_length, fraction, version], build)
    return Split(*(shared[name].to_numpy() for name in ("samples", "held", "start")))


def _split(source: Manifest, sequence_length: int | None, fraction: float, version: int) -> Split:
    samples = source.samples(sequence_length)
    if not fraction:
        return whole(samples, np.ones(len(samples)), 0.0)
    if version == 1:
        return runs(samples, _identity(source), fraction)
    known = source.places >= 0
    places = source.places / PLACES
    if source.kind == "rows" and not known.all():
        rows, grown = whole(samples, places, fraction), growing_runs(samples, _identity(source), fraction)
        return Split(grown.samples, np.where(known, rows.held, grown.held), np.where(known, rows.start, grown.start))
    if not known.all():
        places[~known] = hash64(_identity(source))[~known] / 2.0**64
    return whole(samples, places, fraction)


def _identity(source: Manifest) -> np.ndarray:
    """Identifies each chunk by its shard's footer digest and its row group: uint64 [chunks]."""
    footers = source.chunks["footer"].unify_dictionaries().combine_chunks()
    known = np.array([int(f[:16], 16) for f in footers.dictionary.to_pylist()], dtype=np.uint64)
    return known[footers.indices.to_numpy()] + source.chunks["row_group"].to_numpy().astype(np.uint64)


def whole(samples: np.ndarray, places: np.ndarray, fraction: float) -> Split:
    """Holds out, whole, the chunks whose place is below the fraction."""
    held_out = np.where(places < fraction, samples, 0)
    return Split(samples.astype(np.int64), held_out.astype(np.int64), np.broadcast_to(np.int64(0), len(samples)))


def growing_runs(samples: np.ndarray, identity: np.ndarray, fraction: float) -> Split:
    """Holds out floor(samples * fraction + u) rows of each chunk, with u uniform by hash.

    The total is right on average however small the chunks are.
    """
    first, second = _hashes(identity)
    held_out = np.minimum(np.floor(samples * fraction + first / 2.0**64).astype(np.int64), samples)
    start = (second % np.maximum(samples, 1).astype(np.uint64)).astype(np.int64)
    return Split(samples.astype(np.int64), held_out, start)


def runs(samples: np.ndarray, identity: np.ndarray, fraction: float) -> Split:
    """Holds out floor(samples * fraction + u) rows of each chunk by the rules of version 1 of the data plan.

    A run of held-out rows ends within its chunk, so where it starts depends on the fraction (in `growing_runs` it does not).
    """
    first, second = _hashes(identity)
    held_out = np.minimum(np.floor(samples * fraction + first / 2.0**64).astype(np.int64), samples)
    start = (second % (samples - held_out + 1).astype(np.uint64)).astype(np.int64)
    return Split(samples.astype(np.int64), held_out, start)


def _hashes(identity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return hash64(identity), hash64(identity ^ np.uint64(0x5851F42D4C957F2D))
