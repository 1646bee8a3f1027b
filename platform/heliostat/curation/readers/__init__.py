"""Reads documents from files as streams. The readers are pure functions of a path (for the ids) and an open binary stream.

    for item in read("crawl/CC-MAIN-1.warc.gz", stream, Limits()): ...   # Document, or Dropped with the reason and the position

KINDS is the only list of file types, and `streams.CODECS` the only list of compressions; every pipeline uses both. Only one
document is in memory at a time, for files of any size. Invalid data raises no error: an invalid part becomes a `Dropped`, and
reading continues after this part if possible. Errors of the stream itself, such as a failed object store, are raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Literal

from heliostat.curation.pieces import FilePart
from heliostat.curation.readers import parquet, streams, survey, tables, warc
from heliostat.curation.readers.streams import REASONS as REASONS
from heliostat.curation.readers.streams import LeftOutError, codec_of
from heliostat.curation.readers.streams import ReadLimits as Limits
from heliostat.curation.readers.survey import Survey
from heliostat.curation.stage import Document, Dropped


@dataclass(frozen=True)
class Kind:
    """Describes a file type.

    - `number`: the unit of the number after `#` in an id: lines, rows, or bytes; "" if a file is one document.
    - `stage`: the pipeline stage that extracts the text from bytes; "" if the documents are already text.
    - `ranged`: whether `read` also accepts a `FilePart`, and then yields only the documents that begin in this part.
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
    ".wet": Kind(partial(warc.records, kind="conversion"), "byte", ranged=True),
    ".wat": Kind(partial(warc.records, kind="metadata"), "byte", ranged=True),
    ".warc": Kind(partial(warc.records, kind="response"), "byte", "extract", ranged=True),
    **dict.fromkeys((".html", ".htm", ".xhtml"), Kind(streams.page, stage="extract")),
    ".pdf": Kind(streams.page, stage="pdf"),
}


def suffix_of(path: str) -> str | None:
    """Returns the suffix in KINDS that a path ends with, before any compression suffix; None for an unknown file type."""
    lower = path.lower()
    if codec_of(lower):
        lower = lower.rpartition(".")[0]
    return next((suffix for suffix in KINDS if lower.endswith(suffix)), None)


def kind_of(path: str) -> Kind | None:
    return KINDS.get(suffix_of(path) or "")


def numbered(path: str) -> Literal["", "line", "row", "byte"] | None:
    """Returns the unit of the number after `#` in an id of this file (`Kind.number`), such as "line"; None for an unknown file
    type."""
    kind = kind_of(path)
    return kind.number if kind else None


def ranged(path: str) -> bool:
    """Checks whether heliostat can read a part of a file with this path without the rest. Uncompressed JSON lines are read from
    any line, and uncompressed Parquet files from any row group."""
    kind = kind_of(path)
    return kind is not None and kind.ranged and kind.number != "byte" and codec_of(path) is None


def framed(path: str) -> bool:
    """Checks whether heliostat can read a part of a file with this path after a survey has found where parts can begin:
    JSON lines in .zst, .gz, or .xz, and web archives that are compressed record by record."""
    kind, codec = kind_of(path), codec_of(path)
    if kind is None or not kind.ranged:
        return False
    return (kind.number == "line" and codec in survey.MAGIC) or (kind.number == "byte" and codec == "gz")


def surveyed(path: str, stream: BinaryIO, part: FilePart, target: int, limit: int) -> Survey:
    """Finds the places in a range of a `framed` file at which tasks can begin to read, about every `target` compressed bytes.
    `limit`: the maximum decompressed bytes; a survey that exceeds this limit has no end."""
    codec, stop = codec_of(path), part.bytes if part.stop is None else part.stop
    if codec is not None and numbered(path) == "line":
        return survey.of_lines(stream, codec, part.start, stop, target, limit)
    return survey.of_records(stream, part.start, stop, target, limit)


def read(path: str, stream: BinaryIO, limits: Limits, part: FilePart | None = None) -> Iterator[Document | Dropped]:
    """Yields the documents of a file, and a `Dropped` for each part that can't be read. The file's suffix selects the reader.

    If the file type is ranged, yields only the documents that begin in `part`.
    """
    kind = kind_of(path)
    if kind is None:
        yield Dropped(path, "unknown_kind", f"its name ends in none of {', '.join(KINDS)}")
        return
    try:
        yield from kind.read(path, stream, limits, *([part or FilePart(path, 0, 0)] if kind.ranged else []))
    except LeftOutError as e:
        yield Dropped(path, e.reason, e.detail)
