"""Reads files of documents as streams: pure functions from a path (for the ids) and an open binary stream to documents.

    for item in read("crawl/CC-MAIN-1.warc.gz", stream, Limits()): ...   # Document, or Dropped with a reason and its place

KINDS is the one list of kinds of files, and `streams.CODECS` that of compressions; every pipeline reads by them. Only one
document is in memory at a time, for files of any size. Bad data raises nothing: a broken part is a `Dropped`, and reading
continues after it if possible. Errors of the stream itself (a store that fails) pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Literal

from heliostat.curation.pieces import FilePart
from heliostat.curation.readers import parquet, streams, tables, warc
from heliostat.curation.readers.streams import REASONS as REASONS
from heliostat.curation.readers.streams import LeftOutError, codec_of
from heliostat.curation.readers.streams import ReadLimits as Limits
from heliostat.curation.stage import Document, Dropped


@dataclass(frozen=True)
class Kind:
    """Describes a kind of files.

    `number`: what the number after `#` in an id counts; "" if a file is one document. `stage`: the stage that extracts text
    from its documents, which are bytes until then. `ranged`: `read` also accepts a `FilePart`, and yields the documents that
    begin in it.
    """

    read: Callable[..., Iterator[Document | Dropped]]
    number: Literal["", "line", "row", "byte"] = ""
    stage: Literal["", "extract", "pdf"] = ""
    ranged: bool = False


KINDS = {
    **dict.fromkeys((".txt", ".md", ".py", ".rst"), Kind(streams.text)),
    ".jsonl": Kind(tables.jsonl, "line", ranged=True),
    ".parquet": Kind(parquet.documents, "row", ranged=True),
    ".csv": Kind(partial(tables.separated, mark=","), "row"),
    ".tsv": Kind(partial(tables.separated, mark="\t"), "row"),
    **dict.fromkeys((".arrow", ".feather"), Kind(tables.arrow, "row")),
    **dict.fromkeys((".ndjson", ".json"), Kind(tables.jsonl, "line", ranged=True)),  # C4 and Dolma use .json for JSON lines
    ".wet": Kind(partial(warc.records, kind="conversion"), "byte"),
    ".wat": Kind(partial(warc.records, kind="metadata"), "byte"),
    ".warc": Kind(partial(warc.records, kind="response"), "byte", "extract"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), Kind(streams.page, stage="extract")),
    ".pdf": Kind(streams.page, stage="pdf"),
}


def suffix_of(path: str) -> str | None:
    """Returns the entry of KINDS for a path's suffix, with or without a compression suffix after it; None if there is none."""
    lower = path.lower()
    if codec_of(lower):
        lower = lower.rpartition(".")[0]
    return next((suffix for suffix in KINDS if lower.endswith(suffix)), None)


def kind_of(path: str) -> Kind | None:
    return KINDS.get(suffix_of(path) or "")


def numbered(path: str) -> Literal["", "line", "row", "byte"] | None:
    """Returns what the number after `#` in a file's id counts (`Kind.number`); None for an unknown kind."""
    kind = kind_of(path)
    return kind.number if kind else None


def ranged(path: str) -> bool:
    """Checks whether such a file can be read from the middle: uncompressed lines, and row groups."""
    kind = kind_of(path)
    return kind is not None and kind.ranged and codec_of(path) is None


def read(path: str, stream: BinaryIO, limits: Limits, part: FilePart | None = None) -> Iterator[Document | Dropped]:
    """Yields the documents of a file, by its suffix, and the dropped parts; only those of `part`, if the file is ranged."""
    kind = kind_of(path)
    if kind is None:
        yield Dropped(path, "unknown_kind", f"its name ends in none of {', '.join(KINDS)}")
        return
    try:
        yield from kind.read(path, stream, limits, *([part or FilePart(path, 0, 0)] if kind.ranged else []))
    except LeftOutError as e:
        yield Dropped(path, e.reason, e.detail)
