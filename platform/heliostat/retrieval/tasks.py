"""Makes the passages of a unit of the dataset, in a worker of Ray's, and writes them as fragments of the index's table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from heliostat.inference.batch.tasks import loaded
from heliostat.pipelines.text import tokens
from heliostat.retrieval import table
from heliostat.retrieval.cutting import cut
from heliostat.retrieval.settings import Settings
from heliostat.retrieval.units import Found, Unit, documents
from heliostat.storage import Location


@dataclass(frozen=True)
class Plan:
    """Describes what all units of an index have in common. `before`: the version whose embeddings are taken over, if any."""

    dataset: str
    index: str
    definition: str
    end: int | None
    settings: Settings
    embedder: str | None = None
    dims: int | None = None
    batch: int = 16
    before: int | None = None


def index_unit(spill: Location, unit: Unit, plan: Plan) -> dict[str, Any]:
    """Writes the passages of a unit's documents; returns the task's record."""
    tokenizer, rows, empty, seen = tokens.load(plan.definition), list[dict[str, Any]](), 0, 0
    for found in documents(Location(plan.dataset), unit, plan.end):
        made = passages(tokenizer, found, unit.path, plan.settings)
        empty += not made
        seen += 1
        rows += made
    index = Location(plan.index)
    counts = _embed(rows, index, plan) if plan.embedder else {}
    fragments = table.write(index, pa.Table.from_pylist(rows, table.schema(plan.dims))) if rows else []
    return {"documents": seen, "empty": empty, "passages": len(rows), "fragments": fragments, "files": [], **counts}


def passages(tokenizer: Any, found: Found, path: str, settings: Settings) -> list[dict[str, Any]]:
    """Cuts a document into passages, rows of the table; those of white space alone are none."""
    text = tokenizer.decode(found.tokens.tolist(), skip_special_tokens=False)
    begins = [begin for begin, _ in tokenizer.encode(text, add_special_tokens=False).offsets]
    places = [(a, b) for a, b in cut(text, begins, settings.chunk_tokens, settings.overlap) if text[a:b].strip()]
    key = xxhash.xxh64_intdigest(f"{found.id}\0{text}".encode("utf-8", "surrogatepass")) - (1 << 63)
    about = {"document": found.id, "document_key": key, "shard": path, "row_group": found.row_group}
    return [
        {**about, "number": number, "begin": a, "end": b, "digest": digest(text[a:b]), "text": text[a:b]}
        for number, (a, b) in enumerate(places)
    ]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _embed(rows: list[dict[str, Any]], index: Location, plan: Plan) -> dict[str, int]:
    """Adds the embeddings of the rows' texts, each text's computed once and none that is known; returns what was done."""
    texts = {row["digest"]: row["text"] for row in rows}
    known = table.embeddings(index, plan.before, list(texts)) if plan.before is not None else {}
    new = {digest: text for digest, text in texts.items() if digest not in known}
    vectors, truncated = embed(str(plan.embedder), list(new.values()), plan.batch)
    known |= {digest: vector for digest, vector in zip(new, vectors, strict=True) if vector is not None}
    for row in rows:
        row["embedding"] = known.get(row["digest"])
    return {
        "embedded": len(new),
        "truncated": truncated,
        "unembedded": sum(row["embedding"] is None for row in rows),
    }


def embed(model: str, texts: Sequence[str], batch: int) -> tuple[list[np.ndarray | None], int]:
    """Embeds texts, None where the model cannot; returns also how many of them it takes only the beginning of."""
    from heliostat.inference.batch.engines import Input

    answers = loaded(model, "embed", batch, "{}")([Input(text, 0) for text in texts])
    return [answer.values.get("embedding") for answer in answers], sum(bool(a.values.get("truncated")) for a in answers)
