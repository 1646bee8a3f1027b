"""Orders the samples of every step: pure functions of (row group sizes, weights, seed, step). No I/O, no Ray.

- A *chunk* is a Parquet row group, the unit that storage reads well. Each epoch permutes a source's chunks. Their samples, one
  chunk after another, form the source's *stream*.
- The *global sequence* interleaves the streams of all sources by weight.
- A *window* (shuffle window) is a fixed number of consecutive positions of the global sequence. Within it, each source's samples
  are permuted. One task fetches it.
- A *lane* is a virtual rank: a data-parallel rank whose share of a step doesn't depend on the number of workers.
- A *block* is R = K * G / C consecutive samples (G: global batch size, C: virtual ranks, K: steps in a *round*). Block b belongs
  to virtual rank b mod C in round b div C. Step j of a round uses the j-th G / C samples of every virtual rank's block.
- With N workers, where N divides C, worker r processes every virtual rank l where l mod N = r.

Windows are cut from the global sequence, not from the streams. So every window reads its chunks once, and an epoch may end
anywhere in a window.

Reading single samples at random costs one request each. A window of B chunks costs about B reads for thousands of samples, and
mixes B chunks from the whole dataset. Larger windows shuffle better and start more slowly.

Permutations are the argsort of Philox's raw output: NumPy guarantees this stream, but not `Generator.permutation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pyarrow as pa

from heliostat.data import mapped
from heliostat.data.mixing import Section, Shape, sections
from heliostat.data.split import NEWEST, Split
from heliostat.errors import ConfigError, DataError

CHUNKS, WINDOW = 1, 2  # purposes of a permutation: part of its key, so that an epoch and a window get different permutations
RUN = 256  # chunks of an epoch whose samples are summed together
SLICE = 1 << 20  # chunks that are processed together, because all at once could take much memory


def permutation(size: int, *key: int) -> np.ndarray:
    """Computes a permutation of range(size), int64.

    The permutation depends only on the key, not on the machine or NumPy's version.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(size))


@dataclass(frozen=True)
class SamplePlaces:
    """Locates samples in the sources, by arrays of equal length. `position`: position in the global sequence."""

    position: np.ndarray  # int64
    source: np.ndarray  # int16
    epoch: np.ndarray  # int32
    chunk: np.ndarray  # int32, index into the source's manifest
    row: np.ndarray  # int64, index into the chunk's samples

    def __len__(self) -> int:
        return len(self.position)


@dataclass(frozen=True)
class Round:
    first_step: int
    steps: int
    begin: int  # its positions are [begin, end)
    end: int
    block: int  # number of its first block


class Order:
    """Computes the run's global sequence in O(chunks) per source and epoch. This class never reads samples to skip them."""

    def __init__(
        self,
        splits: list[Split],
        mix: list[tuple[int, list[float]]],
        seed: int,
        shape: Shape,
        max_epochs: list[float | None] | None = None,
        skips: list[tuple[int, int]] | None = None,
        version: int = NEWEST,
    ) -> None:
        """Builds the sequence from the sources' splits.

        `mix`: (step, weights from this step on), from the sequence's first step; `max_epochs`: per source, None for no limit;
        `skips`: pairs (step, count); from this step of the run on, the sequence is `count` steps ahead; `version`: version of the
        data plan. Raises ConfigError if a source has no training sample, or if `max_epochs` leaves too few samples for one step.
        """
        for i, split in enumerate(splits):
            if not split.trained:
                raise ConfigError(
                    f"data.sources.{i}: no training sample left. Lower data.sequence_length or evaluate.fraction, or add data"
                )
        self.splits, self.shape, self.skips = splits, shape, skips or []
        first = mix[0][0]
        self.key = (seed, first) if first else (seed,)  # a sequence that starts later in a run must not repeat the first one
        self.epoch_samples = np.array([s.trained for s in splits], dtype=np.int64)
        limits = max_epochs or [None] * len(splits)
        caps = [None if e is None else int(e * n) for e, n in zip(limits, self.epoch_samples, strict=True)]
        self.sections, self.runs_out = sections(mix, caps, shape, carry=version > 1)
        if not self.sections:
            raise ConfigError("data.sources: max_epochs leaves fewer samples than one train.global_batch_size. Raise max_epochs")
        counts = [0 if s.steps is None else s.steps // s.steps_per_block * shape.lanes for s in self.sections]
        self._blocks = np.concatenate([[0], np.cumsum(counts)[:-1]])  # number of each section's first block
        self._windows = np.concatenate([[0], np.cumsum([-(-c // self.per_window) for c in counts])[:-1]])
        self._steps = np.array([s.first_step for s in self.sections])
        self._begins = np.array([s.begin for s in self.sections])
        self._epochs: dict[tuple[int, int], Epoch] = {}

    # the cut ---------------------------------------------------------------------------------------------------------

    @property
    def per_window(self) -> int:
        """Returns the number of blocks in a window. A section's last window may have fewer."""
        return self.shape.window // self.shape.block

    def _section(self, starts: np.ndarray, at: int) -> int:
        assert at >= starts[0], "the position is before the sequence's first step"
        return int(np.searchsorted(starts, at, side="right")) - 1

    def data_step(self, step: int) -> int:
        """Converts a step of the run to a step of the sequence. After skipped steps, the two differ."""
        return step + sum(count for at, count in self.skips if at <= step)

    def round_of(self, step: int) -> Round:
        """Finds the round of the sequence that contains a step of the run. Raises DataError if the data ends before this step."""
        step = self.data_step(step)
        number = self._section(self._steps, step)
        section = self.sections[number]
        if section.steps is not None and step >= section.first_step + section.steps:
            raise DataError(f"step {step + 1}: the data lasts for {self.runs_out} steps. Raise max_epochs, or lower train.steps")
        skipped = (step - section.first_step) // section.steps_per_block
        begin, size = section.begin, section.steps_per_block * self.shape.batch
        return Round(
            section.first_step + skipped * section.steps_per_block,
            section.steps_per_block,
            begin + skipped * size,
            begin + (skipped + 1) * size,
            int(self._blocks[number]) + skipped * self.shape.lanes,
        )

    def step(self, step: int) -> np.ndarray:
        """Computes the positions of a step's global batch: int64 [virtual ranks, samples per virtual rank]."""
        shape, inside = self.shape, self.round_of(step)
        first = inside.begin + (self.data_step(step) - inside.first_step) * shape.per_lane
        lanes = np.arange(shape.lanes)[:, None] * (inside.steps * shape.per_lane)
        return first + lanes + np.arange(shape.per_lane)[None, :]

    def step_of(self, position: int) -> tuple[int | None, int, int]:
        """Finds the step of the run that uses a position (None: skipped), the virtual rank, and the index in its samples."""
        section = self._at(position)
        number, inside = divmod(position - section.begin, section.steps_per_block * self.shape.batch)
        lane, inside = divmod(inside, section.steps_per_block * self.shape.per_lane)
        later, place = divmod(inside, self.shape.per_lane)
        step = section.first_step + number * section.steps_per_block + later
        shifts = [0, *accumulate(count for _, count in sorted(self.skips))]
        return next((step - s for s in shifts if self.data_step(step - s) == step), None), lane, place

    def window_of(self, block: int) -> int:
        """Finds the number of the window that contains a block."""
        number = self._section(self._blocks, block)
        return int(self._windows[number] + (block - self._blocks[number]) // self.per_window)

    def blocks(self, window: int) -> range:
        """Returns the numbers of a window's blocks."""
        number = self._section(self._windows, window)
        section, first = self.sections[number], int(self._blocks[number])
        begin = first + (window - int(self._windows[number])) * self.per_window
        end = begin + self.per_window
        if section.steps is not None:
            end = min(end, first + section.steps // section.steps_per_block * self.shape.lanes)
        return range(begin, end)

    def block(self, number: int) -> np.ndarray:
        """Computes the positions of a block's samples in the global sequence: int64 [samples per block]."""
        index = self._section(self._blocks, number)
        section = self.sections[index]
        size = section.steps_per_block * self.shape.per_lane
        return section.begin + (number - int(self._blocks[index])) * size + np.arange(size, dtype=np.int64)

    def window_at(self, position: int) -> tuple[int, int, int]:
        """Finds the window that contains a position; returns its number, and the begin and end of its positions [begin, end)."""
        index = self._section(self._begins, position)
        section = self.sections[index]
        size = self.per_window * section.steps_per_block * self.shape.per_lane
        number = (position - section.begin) // size
        begin = section.begin + number * size
        end = begin + size if section.steps is None else min(begin + size, section.begin + section.steps * self.shape.batch)
        return int(self._windows[index]) + number, begin, end

    def consumed(self, step: int) -> np.ndarray:
        """Counts the samples of each source before `step`, including skipped ones: int64 [sources].

        Inside a round, the count is exact to within one sample per virtual rank.
        """
        step = self.data_step(step)
        section = self.sections[self._section(self._steps, max(step, int(self._steps[0])))]
        return section.before(section.begin + (step - section.first_step) * self.shape.batch)

    def before(self, position: int) -> np.ndarray:
        """Counts the samples of each source before a position of the global sequence: int64 [sources]."""
        return self._at(position).before(position)

    def _at(self, position: int) -> Section:
        return self.sections[self._section(self._begins, position)]

    # the samples -----------------------------------------------------------------------------------------------------

    def epoch(self, source: int, number: int) -> Epoch:
        """Returns the order of a source's chunks in an epoch. Caches the newest epochs, twice as many as there are sources."""
        key = (source, number)
        known = self._epochs.get(key)
        if known is None:  # two threads may compute the same epoch; neither may fail because the other removes it
            known = self._epochs[key] = Epoch(self.splits[source], (*self.key, CHUNKS, source, number))
            while len(self._epochs) > 2 * len(self.splits):
                self._epochs.pop(next(iter(self._epochs)), None)
        return known

    def sources(self, positions: np.ndarray) -> np.ndarray:
        """Computes the sources of positions of the global sequence: int64 [n, m] to [n, m]. The positions of a row follow one
        another."""
        if len(self.splits) == 1:
            return np.zeros_like(positions)
        rows = ((int(row[0]), int(row[-1]) + 1) for row in positions)
        return np.stack([self._at(begin).lay_out(begin, end)[0] for begin, end in rows])

    def locate(self, positions: np.ndarray) -> SamplePlaces:
        """Locates the samples at positions of the global sequence: int64 [n], in any order."""
        positions = np.asarray(positions, dtype=np.int64)
        source, epoch = np.empty(len(positions), np.int16), np.empty(len(positions), np.int32)
        chunk, row = np.empty(len(positions), np.int32), np.empty(len(positions), np.int64)
        left = np.arange(len(positions))
        while len(left):
            window, begin, end = self.window_at(int(positions[left[0]]))
            inside = (positions[left] >= begin) & (positions[left] < end)
            at, left = left[inside], left[~inside]
            sources, indices = self._at(begin).lay_out(begin, end)  # indices in each source's endless stream
            local = positions[at] - begin
            source[at] = sources[local]
            for s in np.unique(source[at]).tolist():
                mine = source[at] == s
                stream = indices[sources == s]
                places = self._locate_in_source(s, indices[local[mine]], int(stream[0]), int(stream[-1]) + 1, window)
                epoch[at[mine]], chunk[at[mine]], row[at[mine]] = places
        return SamplePlaces(positions, source, epoch, chunk, row)

    def _locate_in_source(
        self, source: int, index: np.ndarray, first: int, last: int, window: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Locates samples of one window by their stream indices: (epoch, chunk, row).

        The window contains the samples [first, last) of the source's stream.
        """
        size = int(self.epoch_samples[source])
        epochs = index // size
        chunk, row = np.empty(len(index), np.int32), np.empty(len(index), np.int64)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            begin, end = max(first - epoch * size, 0), min(last - epoch * size, size)
            shuffled = permutation(end - begin, *self.key, WINDOW, source, epoch, window)
            place = begin + shuffled[index[mine] - epoch * size - begin]
            chunk[mine], row[mine] = self.epoch(source, epoch).locate(place, begin, end)
        return epochs.astype(np.int32), chunk, row

    def held_shares(self, count: int) -> list[int]:
        """Computes how many held-out samples to take from each source, by weight. Each number is rounded, so the sum may differ
        from `count`."""
        return [max(1, round(count * share)) for share in self.sections[0].mixture.shares]

    def held_out(self, count: int) -> SamplePlaces:
        """Chooses at most `count` held-out samples: evenly spread over each source, in proportion to the sources' weights."""
        parts, counts = [], self.held_shares(count)
        for s, split in enumerate(self.splits):
            total = int(split.held.sum())
            take = min(total, counts[s])
            flat = np.arange(take) * total // max(1, take)
            ends = np.cumsum(split.held)
            chunk = np.searchsorted(ends, flat, side="right")
            row = split.held_rows(chunk, flat - (ends[chunk] - split.held[chunk]))
            parts.append((np.full(take, s, np.int16), chunk.astype(np.int32), row))
        source, chunk, row = (np.concatenate(x) for x in zip(*parts, strict=True))
        n = min(count, len(source))
        return SamplePlaces(np.arange(n), source[:n], np.zeros(n, np.int32), chunk[:n], row[:n])


def shuffled(chunks: int, key: tuple[int, ...]) -> np.ndarray:
    """Permutes `chunks` chunks, int32. All processes of this machine share one copy of a large permutation."""
    if chunks < mapped.LARGE:
        return permutation(chunks, *key).astype(np.int32)
    shared = mapped.table(["permutation", chunks, *key], lambda: pa.table({"chunk": permutation(chunks, *key).astype(np.int32)}))
    return shared["chunk"].to_numpy()


class Epoch:
    """Holds a source's chunks in the order of an epoch.

    To save memory, this class keeps the number of samples in each group of RUN consecutive chunks, not in each chunk.
    """

    def __init__(self, split: Split, key: tuple[int, ...]) -> None:
        self.split, self.chunks = split, shuffled(len(split.samples), key)
        sums = [np.add.reduceat(self._train(part), np.arange(0, len(part), RUN))
                for part in np.split(self.chunks, range(SLICE, len(self.chunks), SLICE))]  # fmt: skip
        self._ends = np.cumsum(np.concatenate(sums))  # samples up to the end of each run

    def _train(self, chunks: np.ndarray) -> np.ndarray:
        return self.split.samples[chunks] - self.split.held[chunks]

    def locate(self, places: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Converts indices of an epoch's samples, all in [begin, end), to (chunk, row)."""
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right").tolist()
        chunks = self.chunks[first * RUN : (last + 1) * RUN]
        train = self._train(chunks)
        ends = np.cumsum(train) + (self._ends[first - 1] if first else 0)
        slot = np.searchsorted(ends, places, side="right")
        chunk = chunks[slot]
        return chunk, self.split.train_rows(chunk, places - (ends[slot] - train[slot]))
