"""Splits samples into training and held-out samples, by the content of each row group alone.

The seed and other data have no influence.

Each row group has a *place* between 0 and 1, and is held out if its place is below `evaluate.fraction`. So the samples that a
larger fraction holds out include those of a smaller fraction, at any sequence length. A document is in one row group, or in
several row groups with the same place. So complete row groups hold out complete documents.

If the manifest has the documents' places (hashes of their texts), a row group's place is their maximum. `prepare` ends row groups
at 1, 2, and 5 tenths, hundredths, and so on. At these fractions, exactly the documents below the fraction are held out.
Otherwise, the place is a hash of the shard's footer digest and the row group's number.

For datasets of rows, a row is a sample. If their places are unknown, a row group needn't be held out completely. Instead, some
consecutive rows of the row group are held out, beginning at a hashed row. The number of these rows grows with the fraction.
After the row group's last row, they continue with its first row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from heliostat.data import mapped
from heliostat.data.manifest import PLACES, Manifest

NEWEST = 2  # newest version of the rules for split and order; the data plan records the version


def hash64(values: np.ndarray) -> np.ndarray:
    """Computes the finalizer of SplitMix64 (Steele et al. 2014), uint64 to uint64. This hash spreads counters and digests
    evenly."""
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Split:
    """Divides a source's row groups into training and held-out samples.

    In each row group, `held` rows from `start` on are held out; after the last row comes row 0.
    """

    samples: np.ndarray  # int64 [chunks]: all samples
    held: np.ndarray  # int64 [chunks]
    start: np.ndarray  # int64 [chunks]

    @property
    def train(self) -> np.ndarray:
        return self.samples - self.held

    @property
    def trained(self) -> int:
        """Counts the training samples of all row groups."""
        return int(self.samples.sum()) - int(self.held.sum())

    def train_rows(self, chunk: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Converts training samples to rows.

        `chunk`: their row groups; `number`: their indices among the row group's training samples.
        """
        samples, held_rows, start = self.samples[chunk], self.held[chunk], self.start[chunk]
        row = number + np.maximum(start + held_rows - samples, 0)
        return np.where(row >= start, row + held_rows, row)

    def held_rows(self, chunk: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Converts held-out samples to rows.

        `chunk`: their row groups; `number`: their indices among the row group's held-out samples.
        """
        return (self.start[chunk] + number) % self.samples[chunk]


def split(source: Manifest, sequence_length: int | None, fraction: float, version: int = NEWEST) -> Split:
    """Splits a dataset into training and held-out samples, by the rules of a version of the data plan.

    `sequence_length`: tokens per sample, None for rows; `fraction`: share of the data to hold out.
    """
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
    """Identifies each row group by its shard's footer digest and its number: uint64 [chunks]."""
    footers = source.chunks["footer"].unify_dictionaries().combine_chunks()
    known = np.array([int(f[:16], 16) for f in footers.dictionary.to_pylist()], dtype=np.uint64)
    return known[footers.indices.to_numpy()] + source.chunks["row_group"].to_numpy().astype(np.uint64)


def whole(samples: np.ndarray, places: np.ndarray, fraction: float) -> Split:
    """Holds out the row groups whose place is below the fraction, each completely."""
    held_out = np.where(places < fraction, samples, 0)
    return Split(samples.astype(np.int64), held_out.astype(np.int64), np.broadcast_to(np.int64(0), len(samples)))


def growing_runs(samples: np.ndarray, identity: np.ndarray, fraction: float) -> Split:
    """Holds out floor(samples * fraction + u) rows of each row group. A hash of the row group gives u, uniform in [0, 1).

    So the total is right on average, even if the row groups are small.
    """
    held_out, second = _rounded(samples, identity, fraction)
    start = (second % np.maximum(samples, 1).astype(np.uint64)).astype(np.int64)
    return Split(samples.astype(np.int64), held_out, start)


def runs(samples: np.ndarray, identity: np.ndarray, fraction: float) -> Split:
    """Holds out floor(samples * fraction + u) rows of each row group by the rules of version 1 of the data plan.

    The held-out rows end within the row group, so their start depends on the fraction. In `growing_runs`, it doesn't.
    """
    held_out, second = _rounded(samples, identity, fraction)
    start = (second % (samples - held_out + 1).astype(np.uint64)).astype(np.int64)
    return Split(samples.astype(np.int64), held_out, start)


def _rounded(samples: np.ndarray, identity: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of held-out rows of each row group, and a second hash of each row group."""
    held_out = np.floor(samples * fraction + hash64(identity) / 2.0**64).astype(np.int64)
    return np.minimum(held_out, samples), hash64(identity ^ np.uint64(0x5851F42D4C957F2D))
