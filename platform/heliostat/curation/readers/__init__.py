"""Reads files of documents as streams: pure functions from a path (for the ids) and an open binary stream to documents.

    for item in read("crawl/CC-MAIN-1.warc.gz", stream, Limits()): ...   # Document, or Dropped with a reason and its place

Nothing is held whole but one document, whatever the file's size, and nothing raises for bad data: what is broken is a `Dropped`,
and reading goes on behind it where that can be found. Errors of the stream itself (a store that fails) pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from heliostat.curation.readers import pages, tables, warc
from heliostat.curation.readers.streams import REASONS as REASONS
from heliostat.curation.readers.streams import LeftOutError, codec_of, unpacked
from heliostat.curation.readers.streams import Limits as Limits
from heliostat.curation.stage import Document, Dropped

READERS = {
    ".warc": warc.responses,
    ".wet": warc.texts,
    ".wat": warc.metadata,
    ".html": pages.page,
    ".htm": pages.page,
    ".xhtml": pages.page,
    ".pdf": pages.page,
    ".csv": tables.csv,
    ".tsv": tables.tsv,
    ".arrow": tables.arrow,
    ".feather": tables.arrow,
    ".jsonl": tables.jsonl,
    ".ndjson": tables.jsonl,
    ".json": tables.jsonl,  # as C4 and Dolma have it: a record a line
    ".txt": pages.text,
    ".md": pages.text,
}


def suffix_of(path: str) -> str | None:
    """Returns the one of READERS that reads a path, whatever compression is named behind it; None if there is none."""
    lower = path.lower()
    if codec_of(lower):
        lower = lower.rpartition(".")[0]
    return next((suffix for suffix in READERS if lower.endswith(suffix)), None)


def read(path: str, stream: BinaryIO, limits: Limits) -> Iterator[Document | Dropped]:
    """Yields the documents of a file, by its suffix, and what is left out of it."""
    suffix = suffix_of(path)
    if suffix is None:
        yield Dropped(path, "unknown_kind", f"its name ends in none of {', '.join(READERS)}")
        return
    try:
        if READERS[suffix] in (warc.responses, warc.texts, warc.metadata) and codec_of(path) == "gz":
            yield from READERS[suffix](path, stream, limits)  # packed record by record
        else:
            yield from READERS[suffix](path, unpacked(path, stream, limits), limits)
    except LeftOutError as e:
        yield Dropped(path, e.reason, e.detail)
