"""Drops documents that contain text from evaluation sets, found by shared n-grams of 13 words (Brown et al. 2020, arXiv
2005.14165, appendix C).

Words are compared as in `minhash` (`heliostat.curation.comparable`): differences in case, accents, punctuation, numbers, and
Unicode form don't matter, and each Chinese character is a word. An evaluation set is a file: JSON lines (all strings of an
example, or only `fields`), or text in which each paragraph is an example. Examples with fewer than `n` words can't match. Before
the pipeline starts, heliostat logs the number of these examples. A document with at least `min_hits` shared n-grams is dropped.
The detail of the dropped document lists the first hits: the evaluation set, the example, and the number of the word in the
document. The authors of GPT-3 removed the matching text instead. They dropped only documents that this removal split into more
than ten pieces.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
from pydantic import Field

from heliostat.curation import decontamination
from heliostat.curation.stage import Document, Outcome, Stage, Work, text_of
from heliostat.tasks import files

log = logging.getLogger(__name__)
LISTED = 5  # maximum hits in a document's detail


class Decontaminate(Stage):
    needs: ClassVar = ("curation", "numba")
    libraries: ClassVar[tuple[str, ...]] = ("regex",)
    reasons: ClassVar[dict[str, str]] = {"contaminated": "at least min_hits n-grams of an evaluation set"}
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"hits": ("min_hits",)}
    version: ClassVar[int] = 2  # words from `comparable`: accents and numbers don't count; Chinese has words
    paths: ClassVar[tuple[str, ...]] = ("sets",)

    sets: dict[str, str] = Field(min_length=1)
    """Evaluation sets: maps the name of each set to its file."""
    fields: list[str] = []
    """Fields of JSON lines to compare. Empty: all strings."""
    n: int = Field(13, ge=2, le=100)
    """Words per n-gram."""
    min_hits: int = Field(1, ge=1)
    """Minimum number of shared n-grams to drop a document (`contaminated`)."""

    def check(self) -> None:
        super().check()
        for name, count in decontamination.short(self._read(), self.fields, self.n).items():
            log.warning("decontaminate: %d examples of %s have fewer than %d words, so heliostat can't find these examples. "
                        "Lower n to include these examples", count, name, self.n)  # fmt: skip

    def _read(self) -> decontamination.EvaluationSets:
        return {name: (path, files.read("sets", path)) for name, path in self.sets.items()}

    def open(self) -> Work:
        super().check()
        index = decontamination.index(self._read(), self.fields, self.n)

        def outcome(document: Document, grams: np.ndarray) -> Outcome:
            hits = index.hits(grams)
            measures = {"hits": len(hits), "hit_share": len(hits) / len(grams) if len(grams) else 0.0}
            if len(hits) < self.min_hits:
                return Outcome(document, measures=measures)
            return Outcome(None, "contaminated", _listed(index, grams, hits), measures)

        def work(documents: list[Document]) -> list[Outcome]:
            return list(map(outcome, documents, decontamination.grams([text_of(d) for d in documents], self.n)))

        return work


def _listed(index: decontamination.NgramIndex, grams: np.ndarray, hits: np.ndarray) -> str:
    """Returns the first matches as text, at most LISTED examples: `set#example at word N; …`. N is the number of the word in the
    document."""
    seen = dict[str, int]()
    for at in hits.tolist():
        seen.setdefault(index.name(grams[at]), at + 1)
        if len(seen) > LISTED:
            break
    more = len(seen) > LISTED
    return "; ".join(f"{name} at word {at:,}" for name, at in list(seen.items())[:LISTED]) + ("; and more" if more else "")
