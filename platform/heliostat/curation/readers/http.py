"""Parses an HTTP response as a web archive holds it: head, transfer and content encoding, within a limit."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

HEAD = 1 << 18  # bytes that the head may have
GZIP, PIECE = b"\x1f\x8b", 1 << 14  # the mark of a member, and bytes that are unpacked at a time


class BadResponseError(Exception):
    """Reports that a response cannot be read; `reason` is one of the readers'."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Response:
    """Holds what a response says of itself, and its body, unpacked."""

    status: int
    content_type: str
    body: bytes


def parse(block: bytes, most: int) -> Response:
    """Parses a response; BadResponseError if it is none, or more than `most` bytes when unpacked."""
    ends = [(at, len(mark)) for mark in (b"\r\n\r\n", b"\n\n") if (at := block.find(mark, 0, HEAD)) >= 0]
    if not block.startswith(b"HTTP/") or not ends:
        raise BadResponseError("corrupt", "no HTTP response")
    at, size = min(ends)
    first, *lines = block[:at].decode("latin-1").splitlines()
    headers = {name.strip().lower(): value.strip() for name, mark, value in (line.partition(":") for line in lines) if mark}
    status = first.split(None, 2)[1:2]
    if not status or not status[0].isdigit() or len(status[0]) != 3:
        raise BadResponseError("corrupt", "no status in the response")
    body = block[at + size :]
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _joined(body)
    if (packed := headers.get("content-encoding", "").lower()) in ("gzip", "x-gzip", "deflate"):
        body = _unpacked(body, packed, most)
    return Response(int(status[0]), headers.get("content-type", ""), body)


def _joined(body: bytes) -> bytes:
    """Joins chunks; a body that is not in chunks, as some archives keep it, stays as it is."""
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


def _unpacked(body: bytes, packed: str, most: int) -> bytes:
    """Unpacks a body; one that is not packed, as some archives keep it, stays as it is."""
    raw = packed == "deflate" and body[:1] != b"\x78"
    if packed != "deflate" and not body.startswith(GZIP):
        return body
    out, at = io.BytesIO(), 0
    try:
        while not at or body.startswith(GZIP, at):  # gzip may have several members; what else stands behind one is nothing
            decoder = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
            while at < len(body) and not decoder.eof:
                piece = body[at : at + PIECE]
                out.write(decoder.decompress(piece, most + 1 - out.tell()))
                if out.tell() > most:
                    raise BadResponseError("too_large", f"more than {most:,} bytes, unpacked")
                at += len(piece) - len(decoder.unused_data)
            if packed == "deflate" or not at:
                break
    except zlib.error as e:
        raise BadResponseError("corrupt", f"content encoding {packed}: {e}") from e
    return out.getvalue()
