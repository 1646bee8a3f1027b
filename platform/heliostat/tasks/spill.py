"""Writes tables to temporary files in the work folder, sorted by a 64-bit key, and reads ranges of keys back.

No other module shuffles data between tasks.

A task writes its result as a file that is named after the file's content and size. If the folder is on a local disk, the task
waits until the data is on the disk. A later task reads its own range of keys from every one of these files. A file whose content
doesn't match its name is removed, so that the next start writes the file again. So no task sorts all data, a task holds only its
own range, and a task that runs twice writes the same file. Row groups are small and record their minimum and maximum key. So
reading a range reads little more than the bytes of this range.
"""

from __future__ import annotations

import hashlib
import io
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.tasks.advance import ADVANCE_BYTES, Reserve, in_advance, unlimited
from heliostat.tasks.names import NAMED
from heliostat.tasks.names import SpilledRun as SpilledRun
from heliostat.tasks.names import named as named
from heliostat.tasks.names import size_of as size_of

GROUP_BYTES = 512 << 10  # bytes of a row group, before compression
READ_BYTES = 16 * GROUP_BYTES  # bytes of row groups, uncompressed, per request to an object store
LOCAL_BYTES = 2 * GROUP_BYTES  # the same per read from a disk: reading one small row group takes longer than its bytes do
FOOTER_BYTES = 16 << 20  # bytes of compressed footers that a call keeps: those of more than 1,024 files of documents
MEMORY = ADVANCE_BYTES + 2 * READ_BYTES + FOOTER_BYTES  # bytes of memory of a task's reads from an object store, and their rows
GAP_BYTES = 1 << 20  # bytes that a request reads in addition, because they take less time than another request
GROUPS = 64  # row groups of a spill: a small spill has smaller groups (down to an eighth), because tasks read little of it
ALL = 1 << 64
NARROW = 1 << 31  # bytes of a column, above which its offsets have 64 bits


def write(folder: Location, table: pa.Table, order: tuple[str, ...] = ()) -> str:
    """Sorts a table by `key` (uint64), then by the columns of `order`, and writes the table to a temporary file. Returns the
    file's name in the folder."""
    return write_sorted(folder, table.sort_by([(name, "ascending") for name in ("key", *order)]))


def write_sorted(folder: Location, table: pa.Table) -> str:
    """Writes a table that is already sorted by `key` to a temporary file. This avoids the copy that sorting makes. Returns the
    file's name."""
    return put(folder, _encode(table, min(GROUP_BYTES, max(GROUP_BYTES // 8, table.nbytes // GROUPS))), ".parquet")


def put(folder: Location, data: bytes, suffix: str) -> str:
    """Writes bytes to a temporary file that is named after its content and size. Returns the name."""
    name = named(data, suffix)
    folder.join(name).write(data, synced=True)
    return name


def bytes_of(names: Iterable[str]) -> int:
    """Sums the sizes in the names of temporary files."""
    return sum(size_of(name) or 0 for name in names)


@contextmanager
def whole(folder: Location, name: str) -> Iterator[None]:
    """Guards the reading of a temporary file. If reading fails, and the file's content doesn't match the digest in its name,
    deletes the file and raises DataError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as e:
        if isinstance(e, FileNotFoundError) or (named := NAMED.fullmatch(name)) is None:
            raise
        place = folder.join(name)
        if hashlib.sha256(place.read()).hexdigest()[:32] == named[1]:
            raise
        place.delete()
        raise DataError(
            f"work: {place}: was damaged, so heliostat removed this file. Run the command again to write this file again"
        ) from e


def narrowed(table: pa.Table) -> pa.Table:
    """Returns a table with the types that datasets use: strings have 32-bit offsets if 32 bits are enough."""
    fields = [f.with_type(pa.string()) if pa.types.is_large_string(f.type) and table[f.name].nbytes < NARROW else f
              for f in table.schema]  # fmt: skip
    return table.cast(pa.schema(fields, table.schema.metadata))


def encode(table: pa.Table, order: tuple[str, ...] = ()) -> bytes:
    """Sorts a table by `key`, then by the columns of `order`, and encodes it as a Parquet file with readable ranges of keys."""
    return _encode(narrowed(table.sort_by([(name, "ascending") for name in ("key", *order)])), GROUP_BYTES)


def _encode(table: pa.Table, group_bytes: int) -> bytes:
    sink = pa.BufferOutputStream()
    rows = max(1, group_bytes * len(table) // max(1, table.nbytes))
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=["key"], row_group_size=rows)
    return sink.getvalue().to_pybytes()


def read(folder: Location, name: str, low: int = 0, high: int = ALL, columns: list[str] | None = None,
         reserve: Reserve = unlimited) -> Iterator[pa.Table]:  # fmt: skip
    """Yields a file's rows with low <= key < high. Reads row groups of together READ_BYTES from S3, because each read costs a
    request, and of LOCAL_BYTES from a disk. Before each read, reserves the memory for the file's bytes and for the rows.

    Raises DataError if the file was damaged.
    """
    place = folder.join(name)
    wanted = None if columns is None else list(dict.fromkeys(["key", *columns]))
    with whole(folder, name), _opened(place, size_of(name)) as (metadata, tables_of):
        for some in _reads(metadata, low, high, READ_BYTES if place.is_s3 else LOCAL_BYTES):
            stored = _stored(metadata, some) if place.is_s3 else 0
            reserve(stored + sum(metadata.row_group(group).total_byte_size for group in some))
            table = place.attempt(partial(tables_of, some, wanted))
            reserve(-stored)
            keys = table["key"].to_numpy()
            start, stop = (int(np.searchsorted(keys, np.uint64(low))), len(keys) if high >= ALL else
                           int(np.searchsorted(keys, np.uint64(high))))  # fmt: skip
            if start < stop:
                yield _part(table, start, stop)


ReadGroups = Callable[[list[int], list[str] | None], pa.Table]


class _Footers:
    """Holds the compressed footers of temporary files in an object store, of at most FOOTER_BYTES bytes in total. The first
    footers stay, because each task of a call reads the same files in the same order."""

    def __init__(self) -> None:
        self.kept, self.bytes, self.lock = dict[str, tuple[bytes, int]](), 0, threading.Lock()

    def add(self, path: str, footer: pq.FileMetaData) -> None:
        sink = pa.BufferOutputStream()
        footer.write_metadata_file(sink)
        encoded = sink.getvalue()
        stored = pa.compress(encoded, codec="zstd", asbytes=True)
        with self.lock:
            if path not in self.kept and self.bytes + len(stored) <= FOOTER_BYTES:
                self.kept[path], self.bytes = (stored, encoded.size), self.bytes + len(stored)

    def get(self, path: str) -> pq.FileMetaData | None:
        if path not in self.kept:
            return None
        stored, size = self.kept[path]
        return pq.read_metadata(pa.BufferReader(pa.decompress(stored, decompressed_size=size, codec="zstd")))


_footers: _Footers | None = None  # of the call that this process runs


@contextmanager
def footers_kept() -> Iterator[None]:
    """Keeps the footers of files in an object store while a call runs several tasks. These tasks often read different ranges of
    the same files."""
    global _footers
    _footers = _Footers()
    try:
        yield
    finally:
        _footers = None


@contextmanager
def _opened(place: Location, size: int | None) -> Iterator[tuple[pq.FileMetaData, ReadGroups]]:
    """Opens a file of `size` bytes. Provides its footer, and a function that reads some columns of some of its row groups.

    An object store sends the footer of a file with known size with one request, unless the footer is kept. Then each read is one
    request, even if only a few columns of each row group are read.
    """
    footers = None if size is None else _footers  # a file of another name can be rewritten during the call
    if place.is_s3 and footers and (footer := footers.get(place.path)):
        yield footer, partial(_with_footer, place, footer)
        return
    if place.is_s3:
        fragment = _large_requests().make_fragment(place.path, place.fs, file_size=size)

        def tables_of(some: list[int], wanted: list[str] | None) -> pa.Table:
            return fragment.subset(row_group_ids=some).to_table(columns=wanted, use_threads=False)

        footer = place.attempt(lambda: fragment.metadata)
        if footers:
            footers.add(place.path, footer)
        yield footer, tables_of
        return
    with place.open() as source:
        file = place.attempt(partial(pq.ParquetFile, source, pre_buffer=False))
        yield file.metadata, lambda some, wanted: file.read_row_groups(some, columns=wanted, use_threads=False)


def _with_footer(place: Location, footer: pq.FileMetaData, some: list[int], wanted: list[str] | None) -> pa.Table:
    """Reads consecutive row groups of a file in an object store with one request, although Arrow needs another one for the size
    or the footer of each file that it opens."""
    first = footer.row_group(some[0]).column(0)
    begin = first.dictionary_page_offset or first.data_page_offset
    part = _FilePart(place.read_object(begin, begin + _stored(footer, some), ""), begin)
    return pq.ParquetFile(part, metadata=footer, pre_buffer=False).read_row_groups(some, columns=wanted, use_threads=False)


class _FilePart(io.BytesIO):
    """Has some bytes of a file at their place in the file. Other bytes can't be read."""

    def __init__(self, content: bytes, begin: int) -> None:
        super().__init__(content)
        self.begin = begin

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(offset - (0 if whence else self.begin), whence) + self.begin

    def tell(self) -> int:
        return super().tell() + self.begin


@lru_cache(maxsize=1)
def _large_requests() -> Any:
    """Returns Parquet's format, for reads in which one request has all wanted columns of adjacent row groups."""
    from pyarrow import dataset  # only tasks with an object store need it

    cache = pa.CacheOptions(hole_size_limit=GAP_BYTES, range_size_limit=4 * READ_BYTES, lazy=False)
    options = dataset.ParquetFragmentScanOptions(pre_buffer=True, cache_options=cache)
    return dataset.ParquetFileFormat(default_fragment_scan_options=options)


def read_all(
    folder: Location, names: Iterable[str], low: int = 0, high: int = ALL, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Yields the rows of several files with low <= key < high, one file after another, like `read`. Reads several files of an
    object store at the same time, because each has several requests that wait for answers."""
    return _together(folder, (partial(read, folder, name, low, high, columns) for name in names))


def _together(folder: Location, reads: Iterable[Callable[[Reserve], Iterator[pa.Table]]]) -> Iterator[pa.Table]:
    return in_advance(reads) if folder.is_s3 else chain.from_iterable(read(unlimited) for read in reads)


def _reads(metadata: pq.FileMetaData, low: int, high: int, bytes: int) -> Iterator[list[int]]:
    """Yields the row groups of each read: as many consecutive row groups as have at most `bytes` bytes, and at least one."""
    waiting, size = list[int](), 0
    for group in _overlapping(metadata, low, high):
        more = metadata.row_group(group).total_byte_size
        if waiting and size + more > bytes:
            yield waiting
            waiting, size = [], 0
        waiting.append(group)
        size += more
    if waiting:
        yield waiting


def _stored(metadata: pq.FileMetaData, some: list[int]) -> int:
    """Returns the bytes of consecutive row groups in the file."""
    return sum(metadata.row_group(group).column(i).total_compressed_size for group in some for i in range(metadata.num_columns))


def _part(table: pa.Table, start: int, stop: int) -> pa.Table:
    """Returns the rows [start, stop) of a table. A small range is a copy, because a slice would keep the whole table in
    memory."""
    if 2 * (stop - start) >= len(table):
        return table.slice(start, stop - start)
    return table.take(pa.array(np.arange(start, stop)))


def _overlapping(metadata: pq.FileMetaData, low: int, high: int) -> Iterator[int]:
    """Yields the row groups whose keys may be in the range, by their statistics.

    The first of these row groups is found by binary search, because keys ascend.
    """
    groups = metadata.num_row_groups if metadata.num_rows else 0  # an empty file has no statistics
    place = metadata.schema.names.index("key") if groups else 0

    def seen(group: int) -> Any:
        return metadata.row_group(group).column(place).statistics

    for group in range(bisect_left(range(groups), low, key=lambda g: seen(g).max), groups):
        if seen(group).min >= high:
            break
        yield group


def joined(folder: Location, names: Iterable[str], low: int, high: int, schema: pa.Schema) -> pa.Table:
    """Reads a range of keys from several files of this schema as one table, which may be empty."""
    return pa.concat_tables([schema.empty_table(), *read_all(folder, names, low, high)])


def arrays(folder: Location, names: list[str], low: int, high: int, **columns: type[np.generic]) -> list[np.ndarray]:
    """Reads numeric columns of a range of keys from several files: an array [rows] per column, with its type."""
    tables = [table.select(list(columns)) for table in read_all(folder, names, low, high)]
    return [np.concatenate([np.zeros(0, kind), *(t[column].to_numpy() for t in tables)]) for column, kind in columns.items()]


def starts(*columns: np.ndarray) -> np.ndarray:
    """Marks the first row of each group of equal rows, as bool [rows]. `columns`: the columns of the sorted rows."""
    first = np.ones(len(columns[0]), bool)
    first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return first


def share(part: int, parts: int) -> tuple[int, int]:
    """Computes the range of keys [low, high) for number `part` of `parts` equal parts of all 64-bit keys."""
    return -(-part * ALL // parts), -(-(part + 1) * ALL // parts)


def mixed(values: np.ndarray) -> np.ndarray:
    """Mixes 64-bit numbers (splitmix64's finalizer), so that equal parts of the range of 64-bit numbers contain about equally
    many of the values."""
    z = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def without(table: pa.Table, dropped: np.ndarray) -> pa.Table:
    """Returns the table without the rows whose value in the column `row` is in `dropped`."""
    if not len(dropped):
        return table
    return table.filter(pc.invert(pc.is_in(table["row"], value_set=pa.array(dropped, table.schema.field("row").type))))


def survivors(
    folder: Location, run: SpilledRun, low: int = 0, high: int = ALL, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Yields the documents of a temporary file in a range of keys, as tables, without the documents that were dropped later."""
    return survivors_of(folder, [run], low, high, columns)


def survivors_of(
    folder: Location, runs: Iterable[SpilledRun], low: int = 0, high: int = ALL, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Yields the documents of several temporary files, one file after another, like `survivors`."""
    return _together(folder, (partial(_survivors, folder, run, low, high, columns) for run in runs))


def _survivors(
    folder: Location, run: SpilledRun, low: int, high: int, columns: list[str] | None, reserve: Reserve
) -> Iterator[pa.Table]:
    decided = [t["row"].to_numpy() for name in run.decided for t in read(folder, name, low, high, None, reserve)]
    gone = np.unique(np.concatenate(decided)) if decided else np.zeros(0, np.uint32)
    for table in read(folder, run.name, low, high, None if columns is None else ["row", *columns], reserve):
        yield without(table, gone)
