"""Keeps the values of row groups in temporary files, so that the driver's memory doesn't grow with row groups.

A dataset of 100 TB has 13 million row groups. The values of each row group are in one temporary file per column, in the order in
which the shards' tasks end. Only the values of each shard are in memory, about 110 bytes. So the manifest's rows can be read in
the manifest's order, a part at a time. Files below FILE_BYTES stay in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.errors import DataError, StorageError
from heliostat.text import brief

DIGITS = 32  # of a row group's digest, in hex
TYPES = {"rows": "<i8", "tokens": "<i8", "bytes": "<i8", "place": "<i8", "content": f"S{DIGITS}"}  # columns of row groups
SHARD = pa.schema(
    [("path", pa.string()), ("footer", pa.string()), ("file_bytes", pa.int64()), ("first", pa.int64()), ("count", pa.int64())]
)  # `first`, `count`: the shard's row groups, as numbers of values in each file
FILE_BYTES = 1 << 20


class _TemporaryFile(tempfile.SpooledTemporaryFile[bytes]):
    def close(self) -> None:
        with suppress(OSError):  # of a full disk: this file vanishes, and `explained` has raised the error
            super().close()


def temporary() -> IO[bytes]:
    """Opens a temporary file, which vanishes with the returned object or with its process."""
    return cast("IO[bytes]", _TemporaryFile(FILE_BYTES))


@contextmanager
def explained() -> Iterator[None]:
    """Raises StorageError if a temporary file can't be written, for example because the disk is full."""
    try:
        yield
    except OSError as e:
        fix = "Free space there, or set TMPDIR to a folder with more space"
        raise StorageError(f"{tempfile.gettempdir()}: can't store the rows of the manifest ({brief(e)}). {fix}") from e


class ColumnFiles:
    """Stores the columns of TYPES, each in a temporary file."""

    def __init__(self) -> None:
        self._files = {name: temporary() for name in TYPES}
        self.count = 0

    def append(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Stores the values of some row groups. Raises StorageError if the disk is full, DataError for an unknown digest."""
        if longer := [one for one in columns["content"] if len(one) > DIGITS]:
            fix = "Prepare the dataset again with --force"
            raise DataError(f"content: a digest has more than {DIGITS} digits ({longer[0][:100]!r}). {fix}")
        with explained():
            for name, kind in TYPES.items():
                self._files[name].write(np.array(columns[name], kind).tobytes())
        self.count += len(columns["rows"])

    def read(self, name: str, firsts: np.ndarray, counts: np.ndarray) -> pa.Array:
        """Reads ranges of a column's values, one after another."""
        file, size, blocks = self._files[name], np.dtype(TYPES[name]).itemsize, list[bytes]()
        with explained():  # the first read writes what is still in a buffer
            for first, count in zip((firsts * size).tolist(), (counts * size).tolist(), strict=True):
                file.seek(first)
                blocks.append(file.read(count))
        values = pa.array(np.frombuffer(b"".join(blocks), TYPES[name]))
        return values.cast(pa.string()) if pa.types.is_binary(values.type) else values


@dataclass(frozen=True)
class StoredRows:
    """Reads the manifest's rows in the manifest's order: by path, then by row group. `shards`: a row of SHARD for each shard, in
    this order."""

    files: ColumnFiles
    shards: pa.Table

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self.shards) else 0

    @cached_property
    def _counts(self) -> np.ndarray:
        return self.shards["count"].to_numpy()

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self._counts)

    def parts(self, names: Sequence[str], size: int) -> Iterator[pa.Table]:
        """Yields some columns of `manifest_table.SCHEMA`, as tables of `size` rows; at least one table."""
        for start in range(0, max(1, len(self)), size):
            yield self._part(names, start, min(start + size, len(self)))

    def _part(self, names: Sequence[str], start: int, stop: int) -> pa.Table:
        """Reads the rows [start, stop)."""
        shards = slice(np.searchsorted(self._ends, start, "right"), np.searchsorted(self._ends, stop, "left") + 1)
        begins = (self._ends - self._counts)[shards]
        skipped = np.maximum(start - begins, 0)  # row groups of the first shard that are in the part before
        counts = np.minimum(stop, self._ends[shards]) - begins - skipped
        each, columns = pa.array(np.repeat(np.arange(len(counts)), counts)), dict[str, pa.Array | pa.ChunkedArray]()
        for name in names:
            if name == "row_group":
                columns[name] = (np.arange(stop - start) - np.repeat(np.cumsum(counts) - counts - skipped, counts)).astype("<i4")
            elif name in TYPES:
                columns[name] = self.files.read(name, self.shards["first"].to_numpy()[shards] + skipped, counts)
            else:
                columns[name] = self.shards[name].slice(shards.start, len(counts)).take(each)
        return pa.table(columns)

    def inside(self, prefix: str) -> StoredRows:
        """Returns the rows of the shards whose path has a prefix, with paths without the prefix."""
        shards = self.shards.filter(pc.starts_with(self.shards["path"], prefix))
        rest = pc.utf8_slice_codeunits(shards["path"], len(prefix))
        return StoredRows(self.files, shards.set_column(0, "path", rest).combine_chunks())
