"""Searches an index by words (BM25), by embeddings (the nearest by cosine), or by both (hybrid). A hybrid search fuses both lists
by rank.

Reciprocal rank fusion (Cormack et al. 2009): a passage's score is the sum of 1 / (60 + its rank) over all lists that contain
the passage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa

from heliostat.apps.search import table, tasks
from heliostat.curation import reasons
from heliostat.data.manifest import SCHEMA, Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.inference.batch.run import model_digest
from heliostat.storage.locations import Location
from heliostat.text import brief

MODES = ("bm25", "dense", "hybrid")
DEPTH = 100  # number of passages of each list that are fused
RANK_CONSTANT = 60
BATCH = 16  # questions per embedding batch


class Passage(TypedDict):
    """Describes a search result: a passage's position, text, and score. `begin`, `end`: characters of its document.

    `rerank_cut`: whether the reranker read only the passage's beginning. `columns`: columns of its document. `used`: how much of
    the passage is in a model's prompt (`whole`, `part`, or `no`).
    """

    document: str
    number: int
    begin: int
    end: int
    shard: str
    row_group: int
    digest: str
    text: str
    score: float
    scored_by: NotRequired[str]
    rerank_score: NotRequired[float]
    rerank_cut: NotRequired[bool]
    columns: NotRequired[dict[str, object]]
    used: NotRequired[str]


def fuse(lists: Sequence[Sequence[Passage]]) -> list[Passage]:
    """Fuses ranked lists by reciprocal rank. Passages with equal scores stay in the order in which they first appear in the
    lists."""
    passages, scores = dict[tuple[str, str, int], Passage](), dict[tuple[str, str, int], float]()
    for ranked in lists:
        for rank, passage in enumerate(ranked, 1):
            name = (passage["shard"], passage["document"], passage["number"])
            passages.setdefault(name, passage)
            scores[name] = scores.get(name, 0.0) + 1 / (RANK_CONSTANT + rank)
    return [{**passages[name], "score": scores[name]} for name in sorted(passages, key=lambda n: -scores[n])]


class SearchIndex:
    """Opens an index for searching. `embedder`: the folder of the index's embedder, if this folder has been moved since the index
    was built."""

    def __init__(self, place: Location, embedder: Path | None = None) -> None:
        self.place, self.record = place, table.read_record(place)
        self.table = table.open_version(place, self.record["version"])
        self._embedder = embedder
        self._embedding = threading.Lock()

    @property
    def modes(self) -> tuple[str, ...]:
        """Returns the search modes that the index supports."""
        return MODES if self.record["embedder"] else ("bm25",)

    def search(self, questions: Sequence[str], mode: str, top: int) -> list[list[Passage]]:
        """Returns at most `top` passages for each question, best first.

        Raises ConfigError if the mode needs embeddings that the index lacks, or if the embedder can't embed a complete
        question.
        """
        if mode not in self.modes:
            raise ConfigError(
                f"--mode {mode}: {self.place} has no embeddings. Make an index with --embedder MODEL, or use --mode bm25"
            )
        depth = top if mode != "hybrid" else max(top, DEPTH)
        words = [self._by_words(question, depth) for question in questions] if mode != "dense" else []
        near = [self._nearest(vector, depth) for vector in self._vectors(questions)] if mode != "bm25" else []
        if mode != "hybrid":
            return words or near
        return [fuse(both)[:top] for both in zip(words, near, strict=True)]

    def too_long(self, questions: Sequence[str]) -> set[str]:
        """Returns the questions that exceed the embedder's maximum tokens; an empty set if the index has no embeddings."""
        if not self.record["embedder"]:
            return set()
        with self._embedding:
            return tasks.longer(str(self.embedder), {question: question for question in questions}, BATCH)

    def columns(self, document: str) -> dict[str, object]:
        """Returns the columns that the dataset records for a document, such as the document's URL.

        Raises DataError if the index's record of its documents is missing.
        """
        if not self.record["ends"]:
            return {}
        kept = Manifest(self.place, SCHEMA.empty_table(), {"curation": {"ends": self.record["ends"]}})
        try:
            return next((row["columns"] for row in reasons.end_of(kept, document)), {})
        except FileNotFoundError as e:
            missing = f"{self.place}: the index's record of its documents is missing ({brief(e)})"
            raise DataError(f"{missing}. Run `heliostat search index` again") from e

    def holding(self, documents: set[str]) -> set[str]:
        """Returns the documents that have passages in the index. Reads all document ids of the index."""

        def known() -> set[str]:
            batches = self.table.to_batches(columns=["document"], filter="number = 0")
            return {id for batch in batches for id in batch["document"].to_pylist() if id in documents}

        return table.read(self.place, known)

    def _by_words(self, question: str, top: int) -> list[Passage]:
        from lance.query import MatchQuery

        return self._ranked("_score", lambda s: s, full_text_query=MatchQuery(question, "text"), limit=top)

    def _nearest(self, vector: np.ndarray, top: int) -> list[Passage]:
        nearest = {"column": "embedding", "q": vector, "k": top, "metric": "cosine"}
        return self._ranked("_distance", lambda d: 1 - d, nearest=nearest)

    def _ranked(self, column: str, score: Callable[[float], float], **search: Any) -> list[Passage]:
        """Runs one search. Returns the passages, sorted by descending score, then by document, then by the passage's number."""
        find: Callable[[], pa.Table] = partial(self.table.to_table, columns=[*table.PLACE, column], **search)
        rows = table.read(self.place, find).to_pylist()
        passages = [cast(Passage, {**{name: row[name] for name in table.PLACE}, "score": score(row[column])}) for row in rows]
        return sorted(passages, key=lambda p: (-p["score"], p["document"], p["number"]))

    def _vectors(self, questions: Sequence[str]) -> list[np.ndarray]:
        with self._embedding:  # concurrent requests share the tokenizer, and each changes its truncation setting
            embedded = tasks.embed(str(self.embedder), questions, BATCH)
        for question, one in zip(questions, embedded, strict=True):
            if not one:
                raise ConfigError(f"question: the embedder knows no token of {question[:80]!r}. Use --mode bm25")
            if one["truncated"]:
                length = f"has more than {one['tokens']:,} tokens, the embedder's maximum"
                raise ConfigError(f"question: {question[:80]!r} {length}. Ask a shorter question, or use --mode bm25")
        return [one["embedding"] for one in embedded]

    @cached_property
    def embedder(self) -> Path:
        """Returns the folder of the index's embedder. Raises ConfigError if this folder doesn't exist, or contains a different
        model."""
        known = self.record["embedder"] or {}
        folder = self._embedder or Path(known["folder"])
        if not folder.is_dir():
            raise ConfigError(f"--embedder: {folder} doesn't exist. Pass the folder of the embedder that built {self.place}")
        if model_digest(folder) != known["digest"]:
            raise ConfigError(
                f"--embedder: {folder} isn't the model {known['digest'][:12]} that built "
                f"{self.place}. Pass the folder of that model"
            )
        return folder
