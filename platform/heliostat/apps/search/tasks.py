"""Makes the passages of one unit of the dataset, in a Ray worker, and writes them as fragments of the index's table."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from heliostat.apps.search import table
from heliostat.apps.search.units import IndexUnit, documents
from heliostat.curation.text import tokens
from heliostat.data import infilling
from heliostat.data.infilling import Markers
from heliostat.inference.batch.tasks import loaded
from heliostat.schema import Strict
from heliostat.storage.locations import Location
from heliostat.tasks import shipping
from heliostat.tasks.shipping import Shipment

if TYPE_CHECKING:
    from heliostat.inference.batch.engines import Embed

Row = dict[str, Any]  # columns of `table.FIELDS`


@dataclass(frozen=True)
class IndexPlan:
    """Holds the settings that all units of an index share.

    `definition`: the tokenizer's JSON. `end`: id of the end-of-document token. `embedder`: the embedder's files; `follows`: the
    digest of these files. `before`: the version whose embeddings are reused. `markers`: the marker tokens of a dataset that is
    rearranged for fill-in-the-middle.
    """

    dataset: str
    index: str
    definition: str
    end: int | None
    settings: IndexSettings
    embedder: Shipment | None = None
    follows: str = ""
    dims: int | None = None
    batch: int = 16
    before: int | None = None
    markers: Markers | None = None


def index_unit(spill: Location, unit: IndexUnit, plan: IndexPlan) -> dict[str, object]:
    """Writes the passages of a unit's documents; returns the task's record."""
    tokenizer, rows, empty, seen = tokens.load(plan.definition), list[Row](), 0, 0
    joined = None if plan.markers else plan.end  # a rearranged document has an end token after each of its spans
    for document in documents(Location(plan.dataset), unit, joined):
        own = passages(
            document.id, _text(tokenizer, document.tokens, plan), unit.path, document.row_group, tokenizer, plan.settings
        )
        empty += not own
        seen += 1
        rows += own
    index = Location(plan.index)
    counts = _embed(rows, index, plan, shipping.here(spill, plan.embedder)) if plan.embedder else {}
    fragments = table.write(index, pa.Table.from_pylist(rows, table.schema(plan.dims))) if rows else []
    return {"documents": seen, "empty": empty, "passages": len(rows), "fragments": fragments, "files": [], **counts}


def _text(tokenizer: Tokenizer, ids: np.ndarray, plan: IndexPlan) -> str:
    if plan.markers:
        return infilling.text(tokenizer, ids, plan.end, plan.markers)
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def passages(id: str, text: str, path: str, row_group: int, tokenizer: Tokenizer, settings: IndexSettings) -> list[Row]:
    """Splits a document into passages, and returns the passages as rows of the table. Leaves out passages that contain only
    white space."""
    begins = [begin for begin, _ in tokenizer.encode(text, add_special_tokens=False).offsets]
    places = [(a, b) for a, b in cut(text, begins, settings.chunk_tokens, settings.overlap) if text[a:b].strip()]
    key = xxhash.xxh64_intdigest(f"{id}\0{text}".encode("utf-8", "surrogatepass")) - (1 << 63)
    about = {"document": id, "document_key": key, "shard": path, "row_group": row_group}
    return [
        {**about, "number": number, "begin": a, "end": b, "digest": digest(text[a:b]), "text": text[a:b]}
        for number, (a, b) in enumerate(places)
    ]


def cut(text: str, begins: Sequence[int], size: int, overlap: int) -> list[tuple[int, int]]:
    """Returns positions (begin, end), in characters, of passages of at most `size` tokens that cover the text.

    `begins`: position of each token. If the last quarter of a passage contains line breaks, the passage ends after the last of
    these line breaks. The next passage begins `overlap` tokens before the end of this passage.
    """
    places, first = list[tuple[int, int]](), 0
    while first < len(begins):
        stop = _stop(text, begins, first, size)
        begin, end = begins[first] if first else 0, begins[stop] if stop < len(begins) else len(text)
        if end > begin:
            places.append((begin, end))
        if stop == len(begins):
            break
        first = max(first + 1, stop - overlap)
    return places


def _stop(text: str, begins: Sequence[int], first: int, size: int) -> int:
    """Finds the end of the passage that begins with the token `first`. Returns the index of the first token after this
    passage."""
    stop = first + size
    if stop >= len(begins):
        return len(begins)
    line_end = text.rfind("\n", begins[first + size * 3 // 4], begins[stop])
    return stop if line_end < 0 else bisect_right(begins, line_end, first + 1, stop)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _embed(rows: list[Row], index: Location, plan: IndexPlan, model: str) -> dict[str, int]:
    """Adds the embeddings to the rows. Embeds each text once, and only if its embedding isn't known.

    Returns the number of embedded texts, the number of truncated passages, and the number of passages without an embedding.
    """
    texts = {row["digest"]: row["text"] for row in rows}
    known = table.embeddings(index, plan.before, list(texts)) if plan.before is not None else {}
    shortened = longer(model, {digest: texts[digest] for digest in known}, plan.batch, plan.follows)
    new = {digest: text for digest, text in texts.items() if digest not in known}
    for digest, values in zip(new, embed(model, list(new.values()), plan.batch, plan.follows), strict=True):
        if values:
            known[digest] = values["embedding"]
            shortened |= {digest} if values["truncated"] else set()
    for row in rows:
        row["embedding"] = known.get(row["digest"])
    return {
        "embedded": len(new),
        "truncated": sum(row["digest"] in shortened for row in rows),
        "unembedded": sum(row["embedding"] is None for row in rows),
    }


def embed(model: str, texts: Sequence[str], batch: int, follows: str = "") -> list[dict[str, Any]]:
    """Embeds texts. Returns a mapping for each text; the mapping is empty if the model can't embed the text.

    `embedding`: float [dims]. `tokens`: number of tokens that the model read. `truncated`: whether the text has more tokens than
    the model read.
    """
    from heliostat.inference.batch.engines import Input

    return [answer.values for answer in loaded(model, "embed", batch, "{}", follows=follows)([Input(text, 0) for text in texts])]


def longer(model: str, texts: dict[str, str], batch: int, follows: str = "") -> set[str]:
    """Returns the names of the texts that have more tokens than the model's maximum."""
    engine = cast("Embed", loaded(model, "embed", batch, "{}", follows=follows))
    encoded = {name: engine.encode(text) for name, text in texts.items()}
    return {name for name, tokens in encoded.items() if len(engine.loaded.seen(tokens, texts[name])) < len(tokens)}


class IndexSettings(Strict):
    """Settings for splitting documents into the passages of an index."""

    chunk_tokens: int = Field(256, ge=16, le=1 << 20)
    """Maximum tokens of a passage, by the dataset's tokenizer."""
    overlap: int = Field(32, ge=0)
    """Tokens that a passage shares with the next one."""

    @model_validator(mode="after")
    def _forward(self) -> IndexSettings:
        """Rejects an overlap of more than half of a passage."""
        if self.overlap * 2 > self.chunk_tokens:
            raise ValueError(
                f"overlap: {self.overlap} is more than half of chunk_tokens {self.chunk_tokens}. Set a smaller overlap"
            )
        return self
