"""Reads web archives: pages from .warc, texts from .wet, and metadata from .wat, with any compression or none.

Archives may be compressed record by record (.gz) or as a whole. A record's id is `path#offset`. For .gz, the offset is the
position of the compressed record in the file; otherwise, the position in the decompressed data. A record is dropped if it is
invalid, doesn't end at its declared length, or is too large for a document. After an invalid record, reading continues at the
next valid record. Other libraries skip unreadable records silently.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from heliostat.curation.encodings import decode
from heliostat.curation.pieces import FilePart
from heliostat.curation.readers.records import Archive, Broken
from heliostat.curation.readers.streams import LeftOutError, ReadLimits, codec_of, unpacked
from heliostat.curation.stage import Document, Dropped

MOST_BREAKS = 10_000  # maximum faults per file after which reading continues
HEADERS = {"url": "warc-target-uri", "date": "warc-date", "record_id": "warc-record-id",
           "crawl_languages": "warc-identified-content-language"}  # fmt: skip
COLUMNS = (*HEADERS, "content_type")  # columns of a document, if their values are known
PAGES = ("text/html", "application/xhtml+xml")
HTTP_HEAD = 1 << 18  # maximum bytes of a response's head
MEMBER, PIECE = b"\x1f\x8b", 1 << 14  # the first bytes of a gzip member, and the bytes that are decompressed at once


def _response(id: str, columns: dict[str, object], block: bytes, limits: ReadLimits) -> Document | Dropped:
    try:
        response = parse(block, limits.max_document_bytes)
    except LeftOutError as e:
        return Dropped(id, e.reason, e.detail)
    if response.status != 200:
        return Dropped(id, "http_status", str(response.status))
    if not response.body.strip():
        return Dropped(id, "empty")
    kind = response.content_type.partition(";")[0].strip().lower()
    columns = columns | ({"content_type": response.content_type} if response.content_type else {})
    if kind == "text/plain":
        return Document(id, decode(response.body, response.content_type)[0], columns)
    if kind in PAGES or (not kind and response.body.lstrip()[:1] == b"<"):
        return Document(id, response.body, columns)
    return Dropped(id, "not_html", kind[:100])


def _text(id: str, columns: dict[str, object], block: bytes, limits: ReadLimits) -> Document | Dropped:
    try:
        return Document(id, block.decode(), columns) if block.strip() else Dropped(id, "empty")
    except UnicodeDecodeError as e:
        return Dropped(id, "not_utf8", f"byte {e.start:,}")


def records(path: str, stream: BinaryIO, limits: ReadLimits, part: FilePart, kind: str) -> Iterator[Document | Dropped]:
    """Yields a document for each record of one kind in `part`, and a `Dropped` with the reason for each invalid record.

    Kinds: `response` is a page as bytes, or plain text; `conversion` (WET) is the text of a page; `metadata` (WAT) is JSON,
    unchanged.
    """
    make = _response if kind == "response" else _text
    packed, total = codec_of(path) == "gz", 0  # compressed record by record
    archive = Archive(stream if packed else unpacked(path, stream, limits), packed, part.start, part.stop)
    for _ in range(MOST_BREAKS):
        try:
            for record in archive.records(limits.max_document_bytes):
                total += record.size
                if total > limits.max_file_bytes:
                    yield Dropped(path, "too_large", f"more than {limits.max_file_bytes:,} bytes, unpacked")
                    return
                if record.headers.get("warc-type", "").lower() != kind:
                    continue
                id = f"{path}#{record.place}"
                if record.block is None:
                    yield Dropped(id, "too_large", f"{record.size:,} bytes")
                else:
                    said = {name: record.headers.get(header) for name, header in HEADERS.items()}
                    columns: dict[str, object] = {name: value.strip("<>") for name, value in said.items() if value}
                    yield make(id, columns, record.block, limits)
            return
        except Broken as e:
            yield Dropped(f"{path}#{e.place}", e.reason, e.detail)
            if not archive.resume():
                return
    yield Dropped(path, "corrupt", f"more than {MOST_BREAKS:,} broken places; what comes after them is not read")


@dataclass(frozen=True)
class Response:
    """Holds an HTTP response from a web archive: the status, the content type, and the decompressed body."""

    status: int
    content_type: str
    body: bytes


def parse(block: bytes, most: int) -> Response:
    """Parses an HTTP response. Raises LeftOutError if the response is invalid, or if its body has more than `most` decompressed
    bytes."""
    ends = [(at, len(mark)) for mark in (b"\r\n\r\n", b"\n\n") if (at := block.find(mark, 0, HTTP_HEAD)) >= 0]
    if not block.startswith(b"HTTP/") or not ends:
        raise LeftOutError("corrupt", "no HTTP response")
    at, size = min(ends)
    first, *lines = block[:at].decode("latin-1").splitlines()
    headers = {name.strip().lower(): value.strip() for name, mark, value in (line.partition(":") for line in lines) if mark}
    status = first.split(None, 2)[1:2]
    if not status or not status[0].isdigit() or len(status[0]) != 3:
        raise LeftOutError("corrupt", "no status in the response")
    body = block[at + size :]
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _joined(body)
    if (packed := headers.get("content-encoding", "").lower()) in ("gzip", "x-gzip", "deflate"):
        body = _decoded(body, packed, most)
    return Response(int(status[0]), headers.get("content-type", ""), body)


def _joined(body: bytes) -> bytes:
    """Joins the chunks of a body with chunked transfer encoding. Returns a body unchanged if the archive stored the body without
    chunks."""
    out, at = list[bytes](), 0
    while True:
        end = body.find(b"\r\n", at, at + 64)
        digits = body[at:end].partition(b";")[0].strip() if end >= 0 else b""
        if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
            return body if not out else b"".join(out)
        size = int(digits, 16)
        if not size:
            return b"".join(out)
        out.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def _decoded(body: bytes, packed: str, most: int) -> bytes:
    """Decompresses a body by its content encoding. Returns a body unchanged if the archive stored the body uncompressed."""
    raw = packed == "deflate" and body[:1] != b"\x78"
    if packed != "deflate" and not body.startswith(MEMBER):
        return body
    out, at = io.BytesIO(), 0
    try:
        while not at or body.startswith(MEMBER, at):  # gzip may have several members; other data after a member is ignored
            decoder = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
            while at < len(body) and not decoder.eof:
                piece = body[at : at + PIECE]
                out.write(decoder.decompress(piece, most + 1 - out.tell()))
                if out.tell() > most:
                    raise LeftOutError("too_large", f"more than {most:,} bytes, unpacked")
                at += len(piece) - len(decoder.unused_data)
            if packed == "deflate" or not at:
                break
    except zlib.error as e:
        raise LeftOutError("corrupt", f"content encoding {packed}: {e}") from e
    return out.getvalue()
