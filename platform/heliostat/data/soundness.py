"""Checks whether a manifest with a matching digest can be true: paths inside the dataset, counts in range, known facts."""

from __future__ import annotations

from typing import Annotated, NotRequired

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from typing_extensions import TypedDict

from heliostat.config.fields import Json
from heliostat.errors import DataError
from heliostat.storage.records import Format, Whole, open_

LARGEST = 2**48  # rows, tokens or bytes of a chunk or its file; sums of all stay within 64 bits
COUNTS = ("row_group", "rows", "tokens", "bytes", "file_bytes")


@open_
class Curation(TypedDict):
    """Describes the record of the documents: the paths of the funnel, and of the ends, each with the first key in it (hex)."""

    funnel: NotRequired[str]
    ends: NotRequired[list[Annotated[list[str], Field(min_length=2, max_length=2)]]]


@open_
class Meta(TypedDict):
    """Describes the metadata that the engine itself takes from a manifest; pipelines add more."""

    kind: Annotated[str, Field(min_length=1)]
    digest: str
    name: NotRequired[str]
    tokenizer: NotRequired[str | None]
    vocab_size: NotRequired[Annotated[int, Field(gt=0, lt=2**31)] | None]
    end_of_document: NotRequired[Annotated[int, Field(ge=0, lt=2**31)] | None]
    documents: NotRequired[Whole]
    duplicates: NotRequired[Whole]
    dropped: NotRequired[dict[str, Whole]]
    parts: NotRequired[dict[str, Whole]]
    also: NotRequired[list[str]]
    curation: NotRequired[Curation]
    unigram_entropy: NotRequired[float | None]


META = Format(Meta, "metadata")


def fault(chunks: pa.Table, meta: dict[str, Json]) -> str:
    """Finds what cannot be true in a manifest's chunks and metadata, and describes it; empty if all can."""
    try:
        META.build(meta, "its metadata")
    except DataError as e:
        return str(e)
    for name in COUNTS:
        least, most = pc.min_max(chunks[name]).values()
        if chunks.num_rows and not 0 <= least.as_py() <= most.as_py() < LARGEST:
            return f"{name}: from {least} to {most}"
    footers = pc.unique(chunks["footer"]).cast(pa.string())
    wrong = pc.invert(pc.match_substring_regex(footers, "^[0-9a-f]{16,128}$"))
    if pc.any(wrong).as_py():
        return f"footer: {footers.filter(wrong)[0].as_py()[:100]!r} is no digest"
    return ""
