"""Reads an input file a few megabytes ahead, and checks that an object in a store is still the one that was listed."""

from __future__ import annotations

import io
from concurrent.futures import Future
from threading import Thread
from typing import Any

import pyarrow as pa

from heliostat.curation.pieces import FilePart
from heliostat.curation.readers.streams import LINE, LeftOutError
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.storage.s3_client import RewrittenError

AHEAD = 4 << 20  # bytes of a file per read
MOST_AHEAD = 32 << 20  # maximum bytes of an object per read in order, because a store limits the requests per second
MEMORY = 2 * MOST_AHEAD  # bytes of memory of these reads: the bytes in use, and those that a thread reads


class ReadAhead(io.RawIOBase):
    """Wraps an input file, on disk or in an object store, as a Python file object that reads a few megabytes ahead. A read of an
    object in order reads up to MOST_AHEAD bytes: the rest of `part`, and LINE bytes more. Meanwhile, a thread reads as many
    bytes after them, so that the task doesn't wait for the store."""

    def __init__(self, place: Location, file: pa.NativeFile | None, size: int, part: FilePart | None) -> None:
        self.place, self.file, self.part, self.length, self.at = place, file, part, size, 0
        self.stop, self.starts = self.length, [0]
        if part is not None:
            start = part.packed.frame if part.packed else part.start
            self.stop, self.starts = part.start + part.length, [start, start - 1]
        self.block, self.begin, self.has_read = b"", 0, False
        self.following: Future[bytes] | None = None
        """The bytes after `block`, if a thread reads them."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def size(self) -> int:
        return self.length

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.length)[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        size = self.length - self.at if size is None or size < 0 else min(size, self.length - self.at)
        if size <= 0:
            return b""
        content = self._of_block(size)
        if len(content) < size and self.following and self.begin <= self.at <= self.end:
            self._take(self.following)
            content += self.block[: size - len(content)]
        if len(content) < size:
            in_order, size_ahead = self._in_order, min(max(size, self._ahead()), self.length - self.at)
            self.block, self.following = b"", None  # so that memory has one block
            self.begin, self.block = self.at, self._fetched(self.at, size_ahead)
            self.has_read = True
            if in_order and size <= AHEAD:  # a reader of larger parts would need other bytes
                self.following = self._follow()
            content = self._of_block(size)
        self.at += len(content)
        return content

    def _take(self, following: Future[bytes]) -> None:
        """Replaces the block with the bytes that follow."""
        self.begin, self.block = self.end, following.result()
        self.following = self._follow()

    @property
    def end(self) -> int:
        return self.begin + len(self.block)

    def _of_block(self, size: int) -> bytes:
        start = self.at - self.begin
        return self.block[start : start + size] if start >= 0 else b""

    @property
    def _in_order(self) -> bool:
        """Checks whether a read from here follows the last one, or is the first one of the part, in an object store."""
        return self.place.is_s3 and (self.begin < self.at <= self.end if self.block else self.at in self.starts)

    def _ahead(self) -> int:
        """Returns the number of bytes to read from here."""
        left, most = self.stop + LINE - self.at, MOST_AHEAD if self._in_order else AHEAD
        return min(most, left) if left > 0 else AHEAD

    def _follow(self) -> Future[bytes] | None:
        """Reads the part's next bytes in a thread, up to MOST_AHEAD. Returns None if the part has no more bytes."""
        begin = self.end
        size = min(MOST_AHEAD, self.stop + LINE - begin, self.length - begin)
        if self.file is not None or size <= 0:
            return None
        following = Future[bytes]()

        def run() -> None:
            try:
                following.set_result(self._fetched(begin, size))
            except Exception as e:  # noqa: BLE001 (raised where the bytes are needed)
                following.set_exception(e)

        Thread(target=run, name="ahead", daemon=True).start()
        return following

    def _fetched(self, begin: int, size: int) -> bytes:
        if self.file is None:
            assert self.part is not None
            try:
                return of_object(self.place, self.part, begin, begin + size)
            except FileNotFoundError as e:
                begun = self.part.start or self.has_read  # then some documents are already read
                raise (changed(self.place, self.part, None) if begun else LeftOutError("unreadable")) from e
        file = self.file
        return self.place.attempt(lambda: file.read_at(size, begin))


def reads(bytes: int) -> int:
    """Returns the number of reads of `bytes` bytes of an object, in order."""
    return -(-bytes // MOST_AHEAD)


def of_object(place: Location, part: FilePart, begin: int, end: int) -> bytes:
    """Reads the bytes `begin` to `end` of an object. Raises DataError if the object was rewritten since the listing."""
    try:
        return place.read_object(begin, end, part.etag) if begin < end else b""
    except RewrittenError as e:
        raise changed(place, part, info.size if (info := place.info()) else part.bytes) from e


def changed(place: Location, part: FilePart, size: int | None) -> DataError:
    """Returns the error for a file that has changed since the input was listed. `size`: the file's bytes now; None if the file is
    missing."""
    other = "content" if part.etag else "modification time"
    same = f"has the same size now, but another {other}"
    now = "is missing now" if size is None else same if size == part.bytes else f"has {size:,} bytes now"
    fix = "Restore the file, then start" if size is None else "Start"
    return DataError(
        f"input: {place}: changed during the run: the file had {part.bytes:,} bytes at the start, and {now}. "
        f"{fix} the command again. Then heliostat processes the file again"
    )
