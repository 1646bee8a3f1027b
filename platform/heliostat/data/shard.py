"""Reads Parquet shards: footers, byte ranges of row groups, and digests that detect a replaced file.

The manifest holds the digest of every shard's footer. Each read of a row group compares this digest, so a replaced shard is
detected. For shards that `prepare` wrote, the manifest also holds XXH3-128 of each row group's stored bytes. This digest shows
changed bytes even if the footer is the same and the page checksums are right. XXH3 detects accidents and replaced files at
memory speed. XXH3 doesn't protect against an attacker who can also write the manifest; the manifest's SHA-256 identifies the
dataset.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

TAIL = 64 << 10  # bytes of the first read: most footers fit


@dataclass(frozen=True)
class Footer:
    """Describes the footer of a shard. `size`: bytes of the shard; `digest`: 32 hex digits, from SHA-256 over the footer."""

    size: int
    digest: str
    parquet: pq.FileMetaData


def read_footer(file: pa.NativeFile) -> Footer:
    """Reads the footer of an open Parquet file in one or two small reads.

    Raises pa.ArrowException, OSError, or ValueError if the file has no valid footer.
    """
    size = file.size()
    tail = file.read_at(min(size, TAIL), max(0, size - TAIL))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > size:  # pyarrow would reserve gigabytes for a damaged length
        raise pa.ArrowInvalid(f"its footer claims {length:,} bytes, but the file has {size:,}")
    raw = tail[-length:] if length <= len(tail) else file.read_at(length, size - length)
    return Footer(size, hashlib.sha256(raw).hexdigest()[:32], pq.read_metadata(io.BytesIO(raw)))


def extent(parquet: pq.FileMetaData, group: int, column: str | None) -> tuple[int, int]:
    """Computes the byte range (begin, end) of a row group in the file; with `column`, the range of this column only."""
    info = parquet.row_group(group)
    every = [info.column(i) for i in range(info.num_columns)]
    ranges = [
        (min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset), c.total_compressed_size)
        for c in every
        if column is None or c.path_in_schema.split(".")[0] == column
    ]
    return min(start for start, _ in ranges), max(start + size for start, size in ranges)


def content_digest(raw: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(raw)


def content_digests(data: bytes, column: str | None) -> list[str]:
    """Computes XXH3-128 of the bytes that training reads of each row group. `data`: the complete file.

    `column`: the column that training reads; None: all columns.
    """
    parquet = pq.read_metadata(io.BytesIO(data))
    places = [extent(parquet, group, column) for group in range(parquet.num_row_groups)]
    return [content_digest(memoryview(data)[start:end]) for start, end in places]


class ExchangedError(ValueError):
    """Reports that a shard or a row group isn't the one that the manifest lists."""


def read_group(file: pa.NativeFile, group: int, column: str | None, footer: str, content: str) -> pa.Table:
    """Reads a row group of an open file, or one of its columns, after it has compared the digests of footer and content with
    the manifest's digests.

    `content`: "" if the manifest doesn't record it. Raises ExchangedError if a digest differs; pa.ArrowException, OSError, or
    ValueError if the file is damaged.
    """
    read = read_footer(file)
    if read.digest != footer:
        raise ExchangedError("this is another shard: its footer differs from the manifest's")
    start, end = extent(read.parquet, group, column)
    if not 0 <= start < end <= read.size:
        raise pa.ArrowInvalid(f"row group {group} is outside the file")
    raw = file.read_buffer(end - start) if file.seek(start) == start else b""
    if content and content_digest(raw) != content:
        raise ExchangedError("its bytes differ from those that the manifest lists")
    part = pa.PythonFile(_Part(raw, start, read.size), mode="r")
    reader = pq.ParquetFile(part, metadata=read.parquet, page_checksum_verification=True)
    return reader.read_row_group(group, columns=[column] if column else None)


class _Part:
    """Presents the bytes of a file from `start` on as a Python file, with the offsets of the complete file."""

    closed = False

    def __init__(self, raw: pa.Buffer, start: int, size: int) -> None:
        self.raw, self.start, self.size, self.at = raw, start, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> pa.Buffer:
        begin = self.at - self.start
        if begin < 0:
            raise pa.ArrowInvalid("its footer refers to bytes outside the row group")
        content = self.raw.slice(begin, len(self.raw) - begin if size < 0 else min(size, max(0, len(self.raw) - begin)))
        self.at += len(content)
        return content

    def close(self) -> None:
        self.closed = True
