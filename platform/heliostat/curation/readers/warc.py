"""Reads web archives with fastwarc: pages of .warc, texts of .wet, metadata of .wat, packed record by record (.gz, .zst) or not.

A record's id is `path#offset`, the offset that its (packed) record has in the file. A record that is broken, shorter than it says or
larger than a document may be is dropped, and reading goes on at the next that can be found behind its start.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO

from heliostat.curation.encodings import decode
from heliostat.curation.readers.http import BadResponseError, Response, parse
from heliostat.curation.readers.streams import Limits
from heliostat.curation.stage import Document, Dropped

PIECE = 1 << 20
MOST_BREAKS = 10_000  # places where reading begins again, in one file
STARTS = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"WARC/1.")  # of a record, packed or not
PAGES = ("text/html", "application/xhtml+xml")
Make = Callable[[str, dict[str, Any], bytes, Limits], Document | Dropped]


def responses(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields the pages that an archive's responses hold, as bytes; plain text as text."""
    yield from _records(path, stream, limits, "response", _response)


def texts(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields the texts that were extracted of pages (WET)."""
    yield from _records(path, stream, limits, "conversion", _text)


def metadata(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields the metadata of records (WAT), JSON as it is there."""
    yield from _records(path, stream, limits, "metadata", _text)


def _response(id: str, columns: dict[str, Any], block: bytes, limits: Limits) -> Document | Dropped:
    try:
        found: Response = parse(block, limits.max_document_bytes)
    except BadResponseError as e:
        return Dropped(id, e.reason, e.detail)
    if found.status != 200:
        return Dropped(id, "http_status", str(found.status))
    if not found.body.strip():
        return Dropped(id, "empty")
    kind = found.content_type.partition(";")[0].strip().lower()
    columns = columns | ({"content_type": found.content_type} if found.content_type else {})
    if kind == "text/plain":
        return Document(id, decode(found.body, found.content_type)[0], columns)
    if kind in PAGES or (not kind and found.body.lstrip()[:1] == b"<"):
        return Document(id, found.body, columns)
    return Dropped(id, "not_html", kind[:100])


def _text(id: str, columns: dict[str, Any], block: bytes, limits: Limits) -> Document | Dropped:
    try:
        return Document(id, block.decode(), columns) if block.strip() else Dropped(id, "empty")
    except UnicodeDecodeError as e:
        return Dropped(id, "not_utf8", f"byte {e.start:,}")


def _records(path: str, stream: BinaryIO, limits: Limits, kind: str, make: Make) -> Iterator[Document | Dropped]:
    """Yields what `make` makes of the records of a kind. One is held back until it is seen that it ends where it says."""
    source, total, at = _Source(stream), 0, 0
    for _ in range(MOST_BREAKS):
        held: Document | Dropped | None = None
        declared, broken = -1, ""
        try:
            for record in _iterator(source):
                at = record.stream_pos
                source.forget(at)
                if held is not None:
                    yield held
                    held = None
                declared, block, size = _read(record, limits.max_document_bytes)
                total += size
                if size != declared:
                    said = f"{declared:,} are said" if declared >= 0 else "no length is said that can be"
                    held, broken = Dropped(f"{path}#{at}", "truncated", f"{size:,} bytes, and {said}"), "length"
                    break
                if total > limits.max_file_bytes:
                    yield Dropped(path, "too_large", f"more than {limits.max_file_bytes:,} bytes, unpacked")
                    return
                if record.headers.get("WARC-Type", "").lower() == kind:
                    large = Dropped(f"{path}#{at}", "too_large", f"{size:,} bytes")
                    held = large if block is None else make(f"{path}#{at}", _columns(record.headers), block, limits)
        except OSError as e:
            if e.errno is not None:  # the stream's own
                raise
            broken = str(e).partition("\n")[0]
            held, at = yield from _judged(path, source, at, declared, held, broken)
        if held is not None:
            yield held
        found = source.resume(at + 1) if broken else None
        if found is None:
            return
        at = found
    yield Dropped(path, "corrupt", f"more than {MOST_BREAKS:,} broken places; what is behind byte {at:,} is not read")


def _judged(
    path: str, source: _Source, at: int, declared: int, held: Document | Dropped | None, broken: str
) -> Generator[Document | Dropped, None, tuple[Document | Dropped | None, int]]:
    """Decides which record is broken, where something is: that which is held, or what is behind it; returns it, and its place."""
    if declared >= 0 and "decompression" in broken:
        return held, at  # packed by itself and whole: what is behind it is told when it is read again
    end = source.end(at, declared) if declared >= 0 else None
    if end is None:
        return Dropped(f"{path}#{at}", "corrupt", broken), at
    if held is not None:
        yield held
    return Dropped(f"{path}#{end}", "corrupt", broken), end


def _iterator(source: _Source) -> Iterator[Any]:
    from fastwarc.warc import ArchiveIterator

    return ArchiveIterator(source, parse_http=False, max_header_len=1 << 20)


def _read(record: Any, most: int) -> tuple[int, bytes | None, int]:
    """Reads a record: the length that it says (-1 if none), its bytes (None if they are more than `most`), their number."""
    said = record.headers.get("Content-Length", "")
    declared = int(said) if said.isascii() and said.isdigit() and len(said) < 19 else -1
    pieces, size = list[bytes](), 0
    while piece := record.reader.read(PIECE):
        size += len(piece)
        if size <= most:
            pieces.append(piece)
        else:
            pieces.clear()
    return declared, b"".join(pieces) if size <= most else None, size


def _columns(headers: Any) -> dict[str, Any]:
    names = {"url": "WARC-Target-URI", "date": "WARC-Date", "record_id": "WARC-Record-ID",
             "crawl_languages": "WARC-Identified-Content-Language"}  # fmt: skip
    return {name: value.strip("<>") for name, header in names.items() if (value := headers.get(header))}


class _Source:
    """Hands a stream on, and holds what was read since the start of the last record, as far as there is room, to read it again."""

    def __init__(self, stream: BinaryIO, room: int = 64 << 20) -> None:
        self._stream, self._room = stream, room
        self._held, self._from, self._at = bytearray(), 0, 0  # bytes, the offset of their first, the offset that is read next

    def read(self, size: int = -1) -> bytes:
        behind = self._at - self._from
        out = bytes(self._held[behind : behind + size])
        if not out:
            out = self._stream.read(min(size, PIECE) if size >= 0 else PIECE)
            self._held += out
        self._at += len(out)
        if len(self._held) > 2 * self._room:
            self.forget(self._from + len(self._held) - self._room)
        return out

    def forget(self, before: int) -> None:
        """Drops what lies before an offset, once it is much."""
        size = min(before, self._at) - self._from
        if size > PIECE:
            del self._held[:size]
            self._from += size

    def end(self, at: int, declared: int) -> int | None:
        """Returns where an unpacked record ends; None if it does not end where its length says, or is packed."""
        start = at - self._from
        head = self._held.find(b"\r\n\r\n", start)
        if start < 0 or head < 0 or not self._held.startswith(b"WARC/", start):
            return None
        end = head + 4 + declared
        return self._from + end + 4 if self._held[end : end + 4] == b"\r\n\r\n" else None

    def resume(self, offset: int) -> int | None:
        """Goes back to the first start of a record at or behind an offset, and returns where that is; None if there is none."""
        self._at = max(offset, self._from)
        while True:
            behind = self._at - self._from
            found = [place for start in STARTS if (place := self._held.find(start, behind)) >= 0]
            if found:
                self._at = self._from + min(found)
                return self._at
            self._at = max(self._at, self._from + len(self._held) - 8)
            block = self._stream.read(PIECE)
            if not block:
                return None
            self._held += block
            self.forget(self._at)

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        """Leaves the stream to whom it belongs."""
