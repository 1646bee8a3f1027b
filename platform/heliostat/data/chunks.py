"""Reading samples from the shards: each chunk once, several at a time, and every fault told apart.

A chunk that is damaged (its pages' checksums, its Parquet structure, its number of tokens) makes all its samples bad, a token
outside the vocabulary makes its own sample bad: both are the same whenever and wherever they are read, and `Dataset.load`
replaces them. A shard that is missing, or a store that fails beyond its retry budget, is an error instead: it may be whole
again tomorrow, and replacing its samples would make the run depend on the weather.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data.manifest import Manifest
from heliostat.data.order import Samples
from heliostat.errors import DataError

READERS = 8  # threads: a window's chunks are read at once, because object storage answers slowly but in parallel


class DamagedError(DataError):
    """A chunk whose content cannot be used."""


@dataclass(frozen=True)
class Gathered:
    """`content` int32 [n, sequence_length]; `faults`: why a sample is bad, by its index (its content is zero)."""

    content: np.ndarray
    faults: dict[int, str]


class TokenChunks:
    """The token chunks of a run's sources, cut into samples of one length."""

    def __init__(self, sources: list[Manifest], length: int) -> None:
        self.sources, self.length = sources, length
        self._paths = [s.chunks["path"].to_pylist() for s in sources]
        self._groups = [s.chunks["row_group"].to_numpy() for s in sources]
        self._tokens = [s.chunks["tokens"].to_numpy() for s in sources]
        self._vocabulary = [int(s.meta.get("vocab_size", np.iinfo(np.int32).max)) for s in sources]

    def gather(self, samples: Samples) -> Gathered:
        """The samples' contents, in their order. DataError for a missing shard, StorageError for a store that fails."""
        out = np.zeros((len(samples), self.length), dtype=np.int32)
        faults: dict[int, str] = {}
        chunk_ids, which = np.unique(np.stack([samples.source, samples.chunk]), axis=1, return_inverse=True)

        def fill(i: int) -> None:
            mine = np.flatnonzero(which == i)
            source, chunk = (int(n) for n in chunk_ids[:, i])
            try:
                tokens = self.read(source, chunk)
            except DamagedError as e:
                faults.update(dict.fromkeys(mine.tolist(), str(e)))
                return
            whole = tokens[: len(tokens) // self.length * self.length].reshape(-1, self.length)
            out[mine] = whole[samples.row[mine]]
            wrong = mine[(out[mine].min(axis=1) < 0) | (out[mine].max(axis=1) >= self._vocabulary[source])]
            if len(wrong):
                out[wrong] = 0
                outside = f"a token outside the vocabulary of {self._vocabulary[source]}"
                faults.update(dict.fromkeys(wrong.tolist(), f"{self.place(source, chunk)}: {outside}"))

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, range(chunk_ids.shape[1])))
        return Gathered(out, faults)

    def place(self, source: int, chunk: int) -> str:
        return f"{self.sources[source].location.join(self._paths[source][chunk])}: row group {self._groups[source][chunk]}"

    def read(self, source: int, chunk: int) -> np.ndarray:
        """All tokens of a chunk, int32, documents end to end; DamagedError says what is wrong with it."""
        location = self.sources[source].location.join(self._paths[source][chunk])
        place = self.place(source, chunk)

        def get() -> pa.Table:
            with location.fs.open_input_file(location.path) as f:
                file = pq.ParquetFile(f, page_checksum_verification=True, pre_buffer=True)
                return file.read_row_group(int(self._groups[source][chunk]), columns=["tokens"])

        try:
            column = location.attempt(get)["tokens"].combine_chunks()
            tokens = column.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
        except FileNotFoundError as e:
            raise DataError(f"{location}: the shard is missing; put it back, or prepare the dataset again") from e
        except (pa.ArrowException, OSError, IndexError, KeyError, ValueError) as e:
            raise DamagedError(f"{place}: cannot be read ({str(e).splitlines()[0]})") from e
        if len(tokens) != (expected := self._tokens[source][chunk]):
            raise DamagedError(f"{place}: has {len(tokens)} tokens, not {expected}")
        return tokens
