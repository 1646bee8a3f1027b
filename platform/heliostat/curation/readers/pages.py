"""Reads files that are one document: HTML pages and PDFs, as bytes for the stages `extract` and `pdf`, and text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from heliostat.curation.readers.streams import ReadLimits, unpacked, whole
from heliostat.curation.stage import Document, Dropped


def page(path: str, stream: BinaryIO, limits: ReadLimits) -> Iterator[Document | Dropped]:
    """Yields the file as a page, or a PDF."""
    data = _whole(path, stream, limits)
    yield Document(path, data) if data.strip() else Dropped(path, "empty")


def text(path: str, stream: BinaryIO, limits: ReadLimits) -> Iterator[Document | Dropped]:
    """Yields the file as text."""
    data = _whole(path, stream, limits)
    yield decoded(path, data) if data.strip() else Dropped(path, "empty")


def decoded(id: str, data: bytes, columns: dict[str, Any] | None = None) -> Document | Dropped:
    """Makes a document of UTF-8, without its byte-order mark."""
    try:
        return Document(id, data.decode("utf-8-sig"), columns or {})
    except UnicodeDecodeError:
        return Dropped(id, "not_utf8")


def _whole(path: str, stream: BinaryIO, limits: ReadLimits) -> bytes:
    return whole(unpacked(path, stream, limits), min(limits.max_document_bytes, limits.max_file_bytes))
