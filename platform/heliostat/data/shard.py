"""Reads shards as files: the footer, the extent of row groups, and the checks that find a file that was exchanged.

The manifest holds the digest of every shard's footer, which is compared whenever a chunk is read: a shard that was exchanged is
not taken for the one that was listed. Of shards that `prepare` wrote it also holds XXH3-128 of each chunk's bytes as they are
stored, so that not even bytes under the same footer with right checksums pass. XXH3 finds accidents and exchanges at
memory speed; it is no protection against one who can also write the manifest, whose SHA-256 names the dataset.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

TAIL = 64 << 10  # bytes that are read first: most footers fit


@dataclass(frozen=True)
class Footer:
    """Describes the footer of a shard of `size` bytes; `digest` is 32 hex digits."""

    size: int
    digest: str
    parquet: pq.FileMetaData


def read_footer(file: pa.NativeFile) -> Footer:
    """Reads the footer of an open Parquet file in one or two small reads; Arrow error, OSError or ValueError if it has none."""
    size = file.size()
    tail = file.read_at(min(size, TAIL), max(0, size - TAIL))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > size:  # a damaged length would make pyarrow reserve gigabytes
        raise pa.ArrowInvalid(f"its footer claims {length:,} bytes, but the file has {size:,}")
    raw = tail[-length:] if length <= len(tail) else file.read_at(length, size - length)
    return Footer(size, hashlib.sha256(raw).hexdigest()[:32], pq.read_metadata(io.BytesIO(raw)))


def extent(parquet: pq.FileMetaData, group: int, column: str | None) -> tuple[int, int]:
    """Computes the byte range (begin, end) of a row group in the file, or of one of its columns."""
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
    """Computes the XXH3-128 of the bytes that training reads of each row group of a whole file: all of them, or one column."""
    parquet = pq.read_metadata(io.BytesIO(data))
    places = [extent(parquet, group, column) for group in range(parquet.num_row_groups)]
    return [content_digest(memoryview(data)[start:end]) for start, end in places]


class ExchangedError(ValueError):
    """Reports that a shard, or a chunk of it, is not the one that the manifest lists."""


def read_group(file: pa.NativeFile, group: int, column: str | None, footer: str, content: str) -> pa.Table:
    """Reads a row group of an open file, or one column of it, after comparing the digests of the footer and of the content.

    `content` is "" where the manifest does not know it. ExchangedError if a digest differs.
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
    """Presents the bytes of a file from `start` on as a Python file, at their offsets in the whole file."""

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
