"""Reads samples from shards, each row group once and several in parallel. Distinguishes damage from storage failures.

All samples of a damaged or replaced row group are bad. heliostat detects the damage from the footer, the bytes, the page
checksums, the Parquet structure, or the number of tokens. A token outside the vocabulary makes only its own sample bad. Every
read gives the same bad samples, and `Dataset.load` replaces them.

If a shard is missing, or the store fails for longer than the retry budget, reading raises an error. heliostat doesn't replace
these samples, because the shard may be readable later, and the run's samples must not depend on chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from heliostat.data import device_threads, shard
from heliostat.data.content import Content, join, take
from heliostat.data.manifest import Manifest
from heliostat.data.order import SamplePlaces
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.text import brief

READERS = 8  # threads that read a window's row groups at the same time, because object storage answers slowly but in parallel


class DamagedError(DataError):
    """Reports that the content of a row group can't be used."""


@dataclass(frozen=True)
class Gathered:
    """Holds the contents of samples.

    `faults`: index of a bad sample -> reason; the content of a bad sample is zeros (tokens) or nulls (rows).
    """

    content: Content
    faults: dict[int, str]


class Chunks:
    """Reads the row groups of a run's sources. `length`: tokens per sample; None for rows."""

    def __init__(self, sources: list[Manifest], length: int | None) -> None:
        self.sources, self.length = sources, length
        self._paths = [s.chunks["path"] for s in sources]
        self._groups = [s.chunks["row_group"].to_numpy() for s in sources]
        self._footers = [s.chunks["footer"] for s in sources]
        self._contents = [s.chunks["content"] for s in sources]
        self._sizes = [s.chunks["tokens" if length else "rows"].to_numpy() for s in sources]
        self._vocabulary = [int(s.meta.get("vocab_size", np.iinfo(np.int32).max)) for s in sources]

    def gather(self, samples: SamplePlaces) -> Gathered:
        """Reads the contents of samples, in their order.

        Raises DataError if a shard is missing. Raises StorageError if the store fails.
        """
        faults: dict[int, str] = {}
        members = _by_chunk(samples)
        tokens = np.empty((len(samples), self.length), dtype=np.int32) if self.length else None

        def fill(mine: np.ndarray) -> Content | None:
            source, chunk = int(samples.source[mine[0]]), int(samples.chunk[mine[0]])
            try:
                content = take(self.read(source, chunk), samples.row[mine])
            except DamagedError as e:
                faults.update(dict.fromkeys(mine.tolist(), str(e)))
                if tokens is not None:
                    tokens[mine] = 0
                return None
            if tokens is None:
                return content
            outside = content.view(np.uint32).max(axis=1) >= self._vocabulary[source]  # as unsigned, so a negative token is large
            if outside.any():
                reason = f"{self.place(source, chunk)}: a token outside the vocabulary of {self._vocabulary[source]}"
                faults.update(dict.fromkeys(mine[outside].tolist(), reason))
                content[outside] = 0
            tokens[mine] = content
            return None

        with device_threads.pool(READERS) as pool:
            parts = list(pool.map(fill, members))
        return Gathered(_arrange(parts, members) if tokens is None else tokens, faults)

    def shard(self, source: int, chunk: int) -> Location:
        """Returns the location of the shard that contains a row group."""
        return self.sources[source].location.join(self._paths[source][chunk].as_py())

    def place(self, source: int, chunk: int) -> str:
        return f"{self.shard(source, chunk)}: row group {self._groups[source][chunk]}"

    def read(self, source: int, chunk: int) -> Content:
        """Reads all samples of a row group.

        Raises DamagedError with the reason if the samples are unusable, and DataError if the shard is missing.
        """
        location, place, length = self.shard(source, chunk), self.place(source, chunk), self.length
        group, footer = int(self._groups[source][chunk]), self._footers[source][chunk].as_py()
        content = self._contents[source][chunk].as_py()

        def get() -> pa.Table:
            with location.fs.open_input_file(location.path) as f:
                return shard.read_group(f, group, "tokens" if length else None, footer, content)

        try:
            table = location.attempt(get)
            values = _tokens(table["tokens"]) if length else table
        except FileNotFoundError as e:
            raise DataError(f"{location}: the shard is missing. Restore it, or prepare the dataset again") from e
        except (pa.ArrowException, OSError, IndexError, KeyError, ValueError) as e:
            raise DamagedError(f"{place}: cannot be read ({brief(e)})") from e
        if len(values) != (expected := self._sizes[source][chunk]):
            raise DamagedError(f"{place}: expected {expected} {'tokens' if length else 'rows'}, found {len(values)}")
        return values[: len(values) // length * length].reshape(-1, length) if length else values


def _tokens(column: pa.ChunkedArray) -> np.ndarray:
    """Joins the tokens of all documents of a row group, end to end: int32 [tokens]."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)


def _by_chunk(samples: SamplePlaces) -> list[np.ndarray]:
    """Groups the samples by row group. Returns an array of sample indices for each row group."""
    order = np.lexsort((samples.chunk, samples.source))
    source, chunk = samples.source[order], samples.chunk[order]
    edges = np.flatnonzero((source[1:] != source[:-1]) | (chunk[1:] != chunk[:-1])) + 1
    return np.split(order, edges) if len(order) else []


def _arrange(parts: list[pa.Table | None], members: list[np.ndarray]) -> pa.Table:
    """Joins tables to one table, in the order of the samples. `members`: the indices of each table's rows in the result. Rows
    of a missing table are null."""
    good = [(mine, part) for mine, part in zip(members, parts, strict=True) if part is not None]
    if not good:
        return pa.table({})
    tables = [part for _, part in good]
    blank = pa.table([pa.nulls(1, f.type) for f in tables[0].schema], schema=tables[0].schema)
    index = np.full(sum(map(len, members)), sum(map(len, tables)), dtype=np.int64)
    index[np.concatenate([mine for mine, _ in good])] = np.arange(sum(map(len, tables)))
    return take(join([*tables, blank]), index)
