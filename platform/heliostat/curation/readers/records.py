"""Reads the records of a web archive (WARC) one after another. After an invalid record, searches for the next valid record."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from heliostat.curation.readers.streams import LeftOutError

PIECE = 1 << 18
PACKED = 1 << 14  # bytes that are decompressed at once; zlib copies the bytes after a member, which are mostly other members
HEAD = 1 << 20  # maximum bytes of a record's head
ROOM = 64 << 20  # bytes after a record's start that stay in memory, to find the next record if this one is broken
GZIP, START, BLANK = b"\x1f\x8b\x08", b"WARC/1.", b"\r\n\r\n"


class Broken(LeftOutError):
    """Reports an invalid record of a web archive. `place`: the record's offset."""

    def __init__(self, place: str, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.place = place


@dataclass(frozen=True)
class WarcRecord:
    """Holds a record of a web archive: the record's offset, the headers by lower-case name, the content (None if the content is
    too large), and the content's size in bytes."""

    place: str
    headers: dict[str, str]
    block: bytes | None
    size: int


class Archive:
    """Reads a web archive's records from a stream. With `packed`, the stream consists of gzip members, which usually contain one
    record each.

    Reads only the members that begin at or after `start` and before `stop`. `start` must be the beginning of a member.
    """

    def __init__(self, stream: BinaryIO, packed: bool, start: int = 0, stop: int | None = None) -> None:
        self._source, self._packed, self._stop = _Source(stream, start), packed, stop
        self._decoder: zlib._Decompress | None = None
        self._plain, self._used = bytearray(), 0  # decompressed data, and the number of its bytes that were read
        self._member, self._inner = start, 0  # start of the member (or uncompressed record), and bytes read since
        self._start = start  # the search for the next record starts after this offset
        self._current = ""  # the place of the current record

    def records(self, most: int) -> Iterator[WarcRecord]:
        """Yields the records; raises Broken at an invalid record. To continue after this record, call `resume`, then `records`
        again. `most`: maximum bytes of a record's content in memory."""
        while True:
            while self._fill(1) and self._plain[self._used] in b"\r\n":
                self._take(1)
            if not self._fill(1):
                return
            place = self._current = self._place()
            self._start = self._member
            self._source.forget(self._start)
            headers = self._head(place)
            said = headers.get("content-length", "")
            if not (said.isascii() and said.isdigit() and len(said) < 19):
                raise Broken(place, "truncated", "no length is said that can be")
            block, size = self._block(place, int(said), most)
            if not self._ends():
                raise Broken(place, "corrupt", "the record does not end where it says")
            self._current = ""
            yield WarcRecord(place, headers, block, size)

    @property
    def member(self) -> int:
        """Returns the offset of the gzip member that has the current record."""
        return self._member

    def _place(self) -> str:
        if not self._packed:
            self._member, self._inner = self._member + self._inner, 0
        return f"{self._member}+{self._inner}" if self._inner else str(self._member)

    def _head(self, place: str) -> dict[str, str]:
        if not self._fill(len(START)) or not self._plain.startswith(START, self._used):
            raise Broken(place, "corrupt", "no record begins here")
        while (end := self._plain.find(BLANK, self._used)) < 0:
            if len(self._plain) - self._used > HEAD:
                raise Broken(place, "corrupt", f"a head of more than {HEAD:,} bytes")
            if not self._fill(len(self._plain) - self._used + 1):
                raise Broken(place, "truncated", "it ends in a record's head")
        lines = self._plain[self._used : end].decode("utf-8", "replace").split("\r\n")[1:]
        self._take(end + len(BLANK) - self._used)
        return {name.strip().lower(): value.strip() for name, mark, value in (line.partition(":") for line in lines) if mark}

    def _block(self, place: str, declared: int, most: int) -> tuple[bytes | None, int]:
        pieces, size, member = list[bytes](), 0, self._member
        while size < declared:
            ready = self._fill(1)
            if not ready or self._member != member:
                self._start = self._member - (1 if ready and self._packed else 0)  # the next member is complete
                raise Broken(place, "truncated", f"{size:,} bytes, and {declared:,} are said")
            count = min(declared - size, len(self._plain) - self._used)
            if declared <= most:
                pieces.append(bytes(memoryview(self._plain)[self._used : self._used + count]))
            self._take(count)
            size += count
        return b"".join(pieces) if declared <= most else None, size

    def _ends(self) -> bool:
        """Checks whether the current record is complete: line ends, or the end of the gzip member, must follow. After the last
        record of a member, reads the member's checksum, too."""
        if self._packed and self._decoder is None and len(self._plain) == self._used:
            return True
        if self._packed:
            while self._decoder is not None and (ready := len(self._plain) - self._used) <= len(BLANK):
                try:
                    self._unpack()
                except Broken as e:
                    if ready < len(BLANK) or e.reason == "corrupt":
                        raise
                    break  # only the checksum is cut off
        else:
            self._fill(len(BLANK))
        rest = self._plain[self._used : self._used + len(BLANK)]
        return BLANK.startswith(rest)

    def _take(self, count: int) -> None:
        self._used += count
        self._inner += count
        if self._used > 4 * PIECE:
            del self._plain[: self._used]
            self._used = 0

    def _fill(self, count: int) -> bool:
        """Buffers at least `count` decompressed bytes of one gzip member. Returns False if the member has fewer bytes left.

        If the current member has no bytes left, opens the next member.
        """
        while len(self._plain) - self._used < count:
            if not self._packed:
                data = self._source.read(PIECE)
                if not data:
                    return False
                self._plain += data
            elif not self._unpack():
                return False
        return True

    def _unpack(self) -> bool:
        """Decompresses more bytes of the current gzip member into the buffer. Returns False if the member has no more bytes.

        Opens the next member only after all bytes of the current member were read.
        """
        if self._decoder is None:
            if len(self._plain) > self._used:
                return False
            while (data := self._source.read(PACKED)).startswith(b"\0"):
                self._source.back(len(data.lstrip(b"\0")))  # zeros between members are padding
            if not data:
                return False
            self._member, self._inner = self._source.at - len(data), 0
            if self._stop is not None and self._member >= self._stop:
                self._source.back(len(data))
                return False
            if not data.startswith(GZIP):
                raise self._broken("corrupt", "no gzip member begins here")
            self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
        else:
            data = self._decoder.unconsumed_tail or self._source.read(PACKED)
            if not data:
                raise self._broken("truncated", "the file ends in a gzip member")
        try:
            self._plain += self._decoder.decompress(data, 4 * PIECE)
        except zlib.error as e:
            raise self._broken("corrupt", str(e)) from e
        if self._decoder.eof:
            self._source.back(len(self._decoder.unused_data))
            self._decoder = None
        return True

    def _broken(self, reason: str, detail: str) -> Broken:
        """Returns a Broken error for the current record, or for the data after the last record.

        Also sets the start of `resume`'s search: just after the beginning of the current gzip member.
        """
        self._start = self._member
        return Broken(self._current or self._place(), reason, detail)

    def resume(self) -> bool:
        """Moves to the next offset, after the invalid record's start, at which a record may begin. Returns False if there is no
        such offset."""
        place = self._source.find(GZIP if self._packed else START, self._start + 1)
        if place is None:
            return False
        self._decoder, self._plain, self._used = None, bytearray(), 0
        self._member, self._inner, self._start, self._current = place, 0, place, ""
        return True


class _Source:
    """Wraps a stream, and buffers the recent data, so that `Archive` can move back in the stream and read the data again."""

    def __init__(self, stream: BinaryIO, start: int = 0) -> None:
        self._stream = stream
        if start:
            stream.seek(start)
        self._buffer, self._from, self.at = bytearray(), start, start  # bytes, offset of the first byte, offset of the next read

    def read(self, size: int) -> bytes:
        """Returns the next `size` bytes, or the bytes that are left."""
        while self.at - self._from + size > len(self._buffer) and (block := self._stream.read(PIECE)):
            self._buffer += block
            if len(self._buffer) > 2 * ROOM:
                self.forget(self._from + len(self._buffer) - ROOM)
        behind = self.at - self._from
        out = bytes(memoryview(self._buffer)[behind : behind + size])
        self.at += len(out)
        return out

    def back(self, size: int) -> None:
        self.at -= size

    def forget(self, before: int) -> None:
        """Drops the buffered data before an offset, if this data has more than 4 PIECEs."""
        size = min(before, self.at) - self._from
        if size > 4 * PIECE:
            del self._buffer[:size]
            self._from += size

    def find(self, what: bytes, offset: int) -> int | None:
        """Searches the stream for `what` from an offset on. Moves to the first match, and returns the match's offset; None
        without a match."""
        self.at = max(offset, self._from)
        while (place := self._buffer.find(what, self.at - self._from)) < 0:
            self.at = max(self.at, self._from + len(self._buffer) - len(what) + 1)
            block = self._stream.read(PIECE)
            if not block:
                return None
            self._buffer += block
            self.forget(self.at)
        self.at = self._from + place
        return self.at
