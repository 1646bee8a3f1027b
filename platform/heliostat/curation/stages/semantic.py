"""Drops documents with nearly the same meaning as another document, by the cosine similarity of embedding vectors. Compares
documents over the complete dataset.

The method is SemDeDup (Abbas et al. 2023, arXiv 2303.09540). `model` is a local folder of a text encoder, as `save_pretrained` or
sentence-transformers writes it. heliostat never runs code from this folder. Spherical k-means assigns documents to cells. In each
cell, the stage visits documents in the order of `keep`. The stage drops a document if the cosine similarity with an earlier
document that stays is `min_similarity` or more. So the documents that stay in a cell are less similar to each other than
`min_similarity`. Each dropped document has a similarity of at least `min_similarity` to a document that stays, not only to
another dropped document.

The stage finds all pairs within a cell. A cell of any size is one task, with bounded memory: if a cell doesn't fit into
`memory_limit`, the task reads the vectors in blocks, and keeps about 30 bytes per document. A dataset of up to `cell_documents`
documents has only one cell. If two similar documents are in different cells, both stay. A second `semantic` stage with another
`seed` uses different cells, so this second stage compares other pairs. Vectors are rounded to 8 bits, so the results are the same
on every machine. The model reads only the first `max_tokens` tokens of a document. Put this stage after `minhash`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from heliostat.curation import embedding, scoring, tally
from heliostat.curation.comparing import conclude, parts
from heliostat.curation.engine import Curated
from heliostat.curation.minhash.keep import Rule
from heliostat.curation.segment import SpilledRun
from heliostat.curation.semantic import cells
from heliostat.curation.stage import GlobalStage
from heliostat.schema import Float
from heliostat.tasks import shipping
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.merging import by_parts
from heliostat.tasks.work import key

VECTORS = 16  # a file of vectors has up to `memory_limit` / VECTORS bytes: it is sorted, encoded, and read again


class Semantic(scoring.NamesModel, GlobalStage):
    compares: ClassVar = ("column",)
    reasons: ClassVar = {"near_duplicate": "means much the same as another document, which stays"}
    thresholds: ClassVar = {"similarity": ("min_similarity",)}

    min_similarity: Float = Field(0.95, gt=0, lt=1)
    """Minimum cosine similarity of duplicates. The right value depends on the model: see the histogram that
    `heliostat data report` shows."""
    cell_documents: int = Field(65_536, ge=1)
    """Documents per cell, approximately. The stage compares each document with all documents of its cell that stay."""
    max_tokens: int = Field(512, ge=8)
    """Maximum tokens of a document that the model reads."""
    batch: int = Field(8, ge=1, le=1024)
    """Batch size: documents of similar length that the model reads together."""
    seed: int = Field(1, ge=0)
    """Random seed for the assignment of documents to cells."""
    keep: Rule = "longest"
    """Order of comparison, which decides which document stays: `longest`, `first` (by id), `oldest` (by the date in `column`), or
    `best` (the largest number in `column`). In a tie, the first by id stays."""
    column: str = ""
    """Column that `oldest` and `best` compare. The column must be one of the pipeline's `columns.others`, or come from an earlier
    stage."""

    @model_validator(mode="after")
    def _column(self) -> Semantic:
        if (self.keep in ("oldest", "best")) != bool(self.column):
            raise ValueError(
                f"keep: {self.keep!r} {'needs a column. Set column' if not self.column else 'compares no column. Remove column'}"
            )
        return self

    def digests(self) -> dict[str, object]:
        return {"model": embedding.identity(self.model)}

    def check(self) -> None:
        config = scoring.describe(self.model)
        scoring.check_length(config, self.max_tokens)
        embedding.pooling(self.model)

    def compare(self, flow: Flow, curated: Curated, number: int, memory_limit: int) -> list[SpilledRun]:
        files, most = embedding.identity(self.model), memory_limit // VECTORS
        model = cells.EmbeddingModel(shipping.describe("model", self.model), self.max_tokens, self.batch)
        follows = [files, self.max_tokens, self.batch, self.library_versions()]
        embeddings = (Task(key("embed", run.name, run.decided, follows, most), {"run": run, "model": model, "most": most},
                           bytes=run.bytes) for run in curated.runs)  # fmt: skip
        embedded = flow.all(f"semantic-{number}-embed", cells.embed, embeddings, pooled=True)
        return self.decided(flow, curated, number, memory_limit, embedded)

    def decided(
        self, flow: Flow, curated: Curated, number: int, memory_limit: int, embedded: list[dict[str, Any]]
    ) -> list[SpilledRun]:
        """Compares the documents' vectors, and drops near-duplicates. Returns the temporary files with the remaining documents.
        `embedded`: records of the tasks that computed the vectors."""
        kind, runs = f"semantic-{number}", curated.runs
        files = [(i, name) for i, r in enumerate(embedded) for name in r["vectors"]]
        rows, size = sum(r["rows"] for r in embedded), max((r["size"] for r in embedded), default=0)
        many = max(1, -(-rows // self.cell_documents))
        centres = self._centres(flow, kind, [n for _, n in files], many, cells.sampled(rows, many, size)) if many > 1 else None
        rule = {"rule": self.keep, "column": self.column, "centres": centres}
        dealing = (Task(key("deal", i, runs[i].name, runs[i].decided, name, rule),
                        {"number": i, "run": runs[i], "vectors_name": name, **rule}) for i, name in files)  # fmt: skip
        dealt = [r["dealt"] for r in flow.all(f"{kind}-deal", cells.deal, dealing)]
        capacity = max(1, memory_limit // 2 // (cells.NUMBER_BYTES * max(1, size)))
        shares = min(many, parts(rows * (size * cells.NUMBER_BYTES + cells.ROW_BYTES), memory_limit))
        judging = by_parts(flow, kind, shares, dealt, least=self.min_similarity, held=capacity)
        judged = flow.all(f"{kind}-judge", cells.judge, judging)
        cut = sum(r["cut"] for r in embedded)
        return conclude(flow, curated, self, number, kind, judged, memory_limit, histograms={"similarity": _summed(judged)},
                        counts={"cut_to_max_tokens": cut} if cut else {})  # fmt: skip

    def _centres(self, flow: Flow, kind: str, names: list[str], many: int, limit: int) -> str:
        about = {"limit": limit, "cells": many, "seed": self.seed}
        task = Task(key("centres", names, about), {"names": names, **about})
        (record,) = flow.all(f"{kind}-centres", cells.centres, iter([task]))
        return record["centres"]


def _summed(judged: list[dict[str, Any]]) -> dict[str, list[int]]:
    total = tally.merge([{"": tally.entry({}, "") | {"histograms": {"similarity": r["bins"]}}} for r in judged])
    return total.get("", {}).get("histograms", {}).get("similarity", {})
