"""Which samples every step trains on: pure functions of (chunk sizes, weights, seed, step). No I/O, no Ray.

Terms. A *chunk* is a Parquet row group, the unit that storage reads well. Each source's chunks are permuted anew every
epoch; their samples, one chunk after another, form the source's stream. Sources are interleaved by weight into the run's
*global sequence*. A *window* is a fixed number of consecutive positions of the global sequence: the samples that each
source brings to it are permuted (the shuffle buffer), and it is fetched by one task (the unit of I/O). Windows are cut on
the global sequence, not on the streams, so every window reads its chunks once, and an epoch may end anywhere in one.

A *lane* is a canonical data-parallel rank: lane l's share of step t never depends on how many workers there are. The
sequence is cut into *envelopes* of R = K * G / C consecutive samples (G: global batch, C: lanes, K: steps in a
*superstep*). Envelope b belongs to lane b mod C of superstep b div C, and step j of a superstep takes the j-th G / C
samples of every lane's envelope. N workers (N divides C): worker r plays the lanes with l mod N = r.

Why windows of whole chunks: a sample drawn from anywhere costs a request each; a window of B chunks costs about B reads
for thousands of samples, and mixes B chunks drawn from the whole dataset. Bigger windows shuffle better and start slower.

Permutations are the argsort of Philox's raw output, because NumPy promises that stream, and not `Generator.permutation`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from heliostat.errors import ConfigError

CHUNKS, WINDOW = 1, 2  # what a permutation is for, so that equal numbers do not give equal orders
MAX_PERIOD = 4_000_000
ENVELOPE_BYTES = 4 << 20  # Ray Data costs 10-45 ms a block whatever its size, so blocks are megabytes
WINDOW_BYTES = 32 << 20
MAX_SUPERSTEP = 64


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size), int64, fixed by the key on every machine and NumPy version."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(size))


def hash64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014), uint64 to uint64: spreads counters and digests evenly."""
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stride_pattern(weights: list[float]) -> np.ndarray:
    """One period of the interleaving: source indices, int16 [P], each source exactly in proportion to its weight.

    Source s's k-th sample is due at virtual time (k + 1/2) / w_s; merging by due time keeps every prefix within a sample
    or so of its share (stride scheduling: Waldspurger and Weihl 1995). ConfigError if the weights need too long a period.
    """
    shares = [Fraction(repr(w)) for w in weights]
    scale = math.lcm(*(s.denominator for s in shares))
    counts = [int(s * scale) for s in shares]
    counts = [c // math.gcd(*counts) for c in counts]
    if sum(counts) > MAX_PERIOD:
        raise ConfigError(f"data.sources: weights {weights} have too many digits to be honoured exactly; round them")
    due = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
    return np.repeat(np.arange(len(counts), dtype=np.int16), counts)[np.argsort(due, kind="stable")]


class Mixture:
    """How many samples of each source the first g positions hold, and which source each position has."""

    def __init__(self, weights: list[float]) -> None:
        self.pattern = stride_pattern(weights)
        sources = np.arange(len(weights), dtype=np.int16)
        self.before = np.zeros((len(weights), len(self.pattern) + 1), dtype=np.int64)
        np.cumsum(self.pattern[None, :] == sources[:, None], axis=1, out=self.before[:, 1:])

    def counts(self, positions: np.ndarray | int) -> np.ndarray:
        """int64 [sources, ...]: samples of each source before the positions."""
        periods, rest = np.divmod(positions, len(self.pattern))
        return np.multiply.outer(self.before[:, -1], periods) + self.before[:, rest]

    def sources(self, positions: np.ndarray) -> np.ndarray:
        return self.pattern[positions % len(self.pattern)]


@dataclass(frozen=True)
class Split:
    """A source's chunks divided into training and held-out samples: in each chunk a run of `held` rows from `start`."""

    samples: np.ndarray  # int64 [chunks], all samples
    held: np.ndarray  # int64 [chunks]
    start: np.ndarray  # int64 [chunks]

    @property
    def train(self) -> np.ndarray:
        return self.samples - self.held


def hold_out(samples: np.ndarray, identity: np.ndarray, fraction: float) -> Split:
    """Splits by hash of each chunk's identity (uint64 [chunks]): the same whatever the seed, order or other chunks.

    A chunk gives floor(samples * fraction + u) samples, u uniform by hash, so the total is right on average however
    small the chunks; they are consecutive, so that few documents stand on both sides.
    """
    first, second = hash64(identity), hash64(identity ^ np.uint64(0x5851F42D4C957F2D))
    held = np.floor(samples * fraction + first / 2.0**64).astype(np.int64)
    held = np.minimum(held, samples) if fraction else np.zeros_like(samples)
    start = (second % (samples - held + 1).astype(np.uint64)).astype(np.int64)
    return Split(samples.astype(np.int64), held, start)


@dataclass(frozen=True)
class Samples:
    """Where samples are, all arrays of one length; `position` is the place in the global sequence."""

    position: np.ndarray  # int64
    source: np.ndarray  # int16
    epoch: np.ndarray  # int32
    chunk: np.ndarray  # int32, index into the source's manifest
    row: np.ndarray  # int64, index into the chunk's samples

    def __len__(self) -> int:
        return len(self.position)


@dataclass(frozen=True)
class Shape:
    """The cut of the global sequence; recorded with the run, because the order follows from it."""

    batch: int  # G
    lanes: int  # C
    superstep: int  # K
    window: int  # samples, a multiple of the envelope

    @property
    def per_lane(self) -> int:
        """Samples of a lane in a step."""
        return self.batch // self.lanes

    @property
    def envelope(self) -> int:
        return self.superstep * self.per_lane


def choose_shape(batch: int, lanes: int, sample_bytes: int, window: int | None = None) -> Shape:
    """Envelopes of about 4 MB and at most 64 steps; windows of about 32 MB, or of at least `window` samples."""
    per_lane = batch // lanes
    superstep = min(MAX_SUPERSTEP, max(1, ENVELOPE_BYTES // (per_lane * sample_bytes)))
    envelope = superstep * per_lane
    wanted = window or WINDOW_BYTES // sample_bytes
    return Shape(batch, lanes, superstep, envelope * max(1, -(-wanted // envelope)))


class Order:
    """The run's global sequence. Building costs O(chunks) per source and epoch touched; nothing is ever skip-read."""

    def __init__(self, splits: list[Split], weights: list[float], seed: int, shape: Shape) -> None:
        for i, split in enumerate(splits):
            if not split.train.sum():
                raise ConfigError(f"data.sources.{i}: holds no training sample; shorten data.sequence_length or add data")
        self.splits, self.seed, self.shape = splits, seed, shape
        self.mixture = Mixture(weights)
        self.epoch_samples = np.array([s.train.sum() for s in splits], dtype=np.int64)
        self._epochs: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def _epoch(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(chunks in this epoch's order, samples before the end of each); the last few are kept."""
        key = (source, epoch)
        if key not in self._epochs:
            train = self.splits[source].train
            chunks = permutation(len(train), self.seed, CHUNKS, source, epoch)
            self._epochs[key] = (chunks, np.cumsum(train[chunks]))
            while len(self._epochs) > 2 * len(self.splits):
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(key)
        return self._epochs[key]

    def locate(self, positions: np.ndarray) -> Samples:
        """The samples at positions of the global sequence, int64 [n] in any order."""
        positions = np.asarray(positions, dtype=np.int64)
        source = self.mixture.sources(positions)
        epoch, chunk, row = (
            np.empty(len(positions), np.int32),
            np.empty(len(positions), np.int32),
            np.empty(len(positions), np.int64),
        )
        windows = positions // self.shape.window
        for window in np.unique(windows):
            edges = np.array([window, window + 1]) * self.shape.window
            counts = self.mixture.counts(edges)
            inside = windows == window
            for s in np.unique(source[inside]):
                at = np.flatnonzero(inside & (source == s))
                index = self.mixture.counts(positions[at])[s]  # in the source's endless stream
                epoch[at], chunk[at], row[at] = self._locate_in_source(int(s), index, counts[s, 0], counts[s, 1], int(window))
        return Samples(positions, source, epoch, chunk, row)

    def _locate_in_source(
        self, source: int, index: np.ndarray, first: int, last: int, window: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, chunk, row) of stream indices that all lie in one window, whose part of the stream is [first, last)."""
        size = int(self.epoch_samples[source])
        split = self.splits[source]
        epochs = (index // size).astype(np.int32)
        chunk, row = np.empty(len(index), np.int32), np.empty(len(index), np.int64)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            begin, end = max(first, epoch * size), min(last, (epoch + 1) * size)
            shuffled = permutation(end - begin, self.seed, WINDOW, source, int(epoch), window)
            place = begin - epoch * size + shuffled[index[mine] - begin]
            chunks, ends = self._epoch(source, int(epoch))
            slot = np.searchsorted(ends, place, side="right")
            chunk[mine] = chunks[slot]
            inner = place - (ends[slot] - split.train[chunks[slot]])
            row[mine] = np.where(inner >= split.start[chunk[mine]], inner + split.held[chunk[mine]], inner)
        return epochs, chunk, row

    def envelope(self, number: int) -> np.ndarray:
        """Positions of an envelope, int64 [R]."""
        return np.arange(self.shape.envelope, dtype=np.int64) + number * self.shape.envelope

    def step(self, step: int) -> np.ndarray:
        """Positions of a step's global batch, int64 [lanes, samples of a lane]."""
        shape = self.shape
        superstep, inner = divmod(step, shape.superstep)
        first = superstep * shape.lanes * shape.envelope + inner * shape.per_lane
        return first + np.arange(shape.lanes)[:, None] * shape.envelope + np.arange(shape.per_lane)[None, :]

    def held_out(self, count: int) -> Samples:
        """At most `count` held-out samples, spread evenly over each source's, sources in proportion to their weights."""
        share = self.mixture.before[:, -1] / len(self.mixture.pattern)
        parts = []
        for s, split in enumerate(self.splits):
            total = int(split.held.sum())
            take = min(total, max(1, round(count * share[s])))
            flat = np.arange(take) * total // max(1, take)
            ends = np.cumsum(split.held)
            chunk = np.searchsorted(ends, flat, side="right")
            row = split.start[chunk] + flat - (ends[chunk] - split.held[chunk])
            parts.append((np.full(take, s, np.int16), chunk.astype(np.int32), row))
        source, chunk, row = (np.concatenate(x) for x in zip(*parts, strict=True))
        n = min(count, len(source))
        return Samples(np.arange(n), source[:n], np.zeros(n, np.int32), chunk[:n], row[:n])
