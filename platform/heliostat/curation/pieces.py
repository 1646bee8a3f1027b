"""Splits an input's files into pieces, one per task. The split is a pure function of the list of files and of a piece size. This
size changes little when files are added.

A large file is split into ranges of bytes, if files of its kind can be read from the middle. The ranges of a compressed file
become parts that begin where a reader can begin (`readers.survey`). Small files are read together. The
names of small files decide where a piece ends, so a new or removed file changes only one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import xxhash

REREAD = ".warc.gz", ".wet.gz", ".wat.gz"  # endings of files whose earlier reader dropped pages at the end of a block
FILE_BYTES = 4096  # cost of opening a file, as a number of bytes that is added to its size
MOST_FILES = 2000  # maximum files of a piece
LEAST, MOST = 1 << 20, 128 << 20  # minimum and maximum bytes of a piece


@dataclass(frozen=True)
class PackedSlice:
    """Describes complete lines of a compressed file: their place in the data that a reader decompresses from a frame on.

    `frame`: the offset of the frame (of gzip: the member). `skip`: the number of decompressed bytes before the first line.
    `size`: the number of bytes of the lines, decompressed; None for all lines up to the end of the file.
    """

    frame: int
    skip: int
    size: int | None


@dataclass(frozen=True, slots=True)
class FilePart:
    """Describes the part of a file to read: the complete file, or the records that begin in a range of bytes. `bytes` and
    `modified` (in nanoseconds since 1970) are the complete file's size and time.

    `first`: the number of the range's first record, counted from 1; 0 if the reader determines the number. `etag`: the ETag of an
    object, if its store has ETags. `path_by_time`: the path in the form of older versions of heliostat, without ETags; "" if it
    is the same. `description`: what a task reads, as JSON, for a part that isn't a file. Then `path` identifies the description.
    `packed`: where the lines of a range are in a compressed file; None for files that aren't compressed.
    """

    path: str
    bytes: int
    modified: int
    start: int = 0
    stop: int | None = None
    first: int = 1
    etag: str = ""
    path_by_time: str = ""
    description: str = ""
    packed: PackedSlice | None = None

    @property
    def length(self) -> int:
        """Returns the number of bytes to read."""
        return (self.bytes if self.stop is None else self.stop) - self.start

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> FilePart:
        """Builds the part with these `fields`."""
        packed = fields.get("packed")
        return cls(**{**fields, "packed": PackedSlice(**packed) if packed else None})

    @property
    def identity(self) -> list[object]:
        """Returns everything that the part's documents depend on, as JSON values."""
        fields = [self.path, self.bytes, self.modified, self.start, self.stop, self.first]
        packed = astuple(self.packed) if self.packed else None
        return [*fields, *(value for value in (self.etag, packed) if value)]

    @property
    def identity_by_time(self) -> list[object]:
        """Returns the identity without the ETag, in the form that older versions of heliostat recorded."""
        return replace(self, path=self.path_by_time or self.path, etag="").identity

    @property
    def fields(self) -> dict[str, object]:
        """Returns the part as JSON values by field names. If the part has no ETag, the fields are the same as in older versions
        of heliostat."""
        added = ("etag", "path_by_time", "description", "packed")
        return {name: value for name, value in asdict(self).items() if name not in added or value}


def size(total: int) -> int:
    """Returns the bytes per piece for an input of `total` bytes: an eighth of `total`, rounded to a power of two, within
    limits."""
    return min(MOST, max(LEAST, 1 << max(0, (total // 8).bit_length() - 1)))


def number(bytes: int, files: int) -> int:
    """Estimates the number of pieces for `bytes` bytes in `files` files."""
    return max(1, -(-(bytes + files * FILE_BYTES) // size(bytes)), -(-files // MOST_FILES))


def cut(files: Iterable[FilePart], target: int, ranged: Callable[[str], bool]) -> Iterator[list[FilePart]]:
    """Yields pieces of about `target` bytes of complete files, in order.

    `ranged` returns whether a file can be read in ranges. Ranges of a file are separate pieces.
    """
    piece, size = list[FilePart](), 0
    for file in files:
        if file.bytes > 2 * target and ranged(file.path):
            yield from ([replace(file, start=a, stop=b, first=0 if a else 1)] for a, b in ranges(file.bytes, target))
            continue
        piece.append(file)
        cost = file.bytes + FILE_BYTES
        size += cost
        if xxhash.xxh64_intdigest(file.path.encode()) * target < cost << 64 or size >= 2 * target or len(piece) >= MOST_FILES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def largest_first(cut_pieces: list[list[FilePart]], target: int) -> Iterator[list[FilePart]]:
    """Yields pieces in order, but first those above twice the target size, the largest first: files that can't be divided. So no
    task of hours starts last."""
    sizes = [sum(part.length for part in piece) for piece in cut_pieces]
    large = sorted((number for number, size in enumerate(sizes) if size > 2 * target), key=lambda number: -sizes[number])
    yield from (cut_pieces[number] for number in large)
    yield from (piece for piece, size in zip(cut_pieces, sizes, strict=True) if size <= 2 * target)


def ranges(bytes: int, target: int) -> list[tuple[int, int]]:
    """Splits a file into ranges of the target size. The last range may be up to 1.5 times as large. If the file grows, the other
    ranges stay the same."""
    count = max(1, (bytes + target // 2) // target)
    return [(i * target, (i + 1) * target if i + 1 < count else bytes) for i in range(count)]


def revision(path: str) -> int:
    """Returns how often a change of the reader gave other documents for the same file. The file's tasks then run again."""
    return int(path.lower().endswith(REREAD))
