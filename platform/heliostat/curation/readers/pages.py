"""Reads files that are one document: HTML pages and PDFs, as bytes for the stages `extract` and `pdf`, and text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from heliostat.curation.readers.streams import Limits, whole
from heliostat.curation.stage import Document, Dropped


def page(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields the file as a page, or a PDF."""
    data = whole(stream, limits.max_document_bytes)
    yield Document(path, data) if data.strip() else Dropped(path, "empty")


def text(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields the file as text."""
    data = whole(stream, limits.max_document_bytes)
    try:
        yield Document(path, data.decode("utf-8-sig")) if data.strip() else Dropped(path, "empty")
    except UnicodeDecodeError as e:
        yield Dropped(path, "not_utf8", f"byte {e.start:,}")
