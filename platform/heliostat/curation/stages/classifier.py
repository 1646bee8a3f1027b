"""Drops documents that a classifier of one's own finds unlike its good examples: linear on hashed n-grams of words.

GPT-3, CCNet's followers and DCLM (Li et al. 2024, arXiv 2406.11794) choose pages so, with fastText on examples of good and
other documents. One is trained with `heliostat curate train-classifier GOOD BAD --out FOLDER`, which reports precision and
recall on held-out documents; its folder holds safetensors and JSON. `score` (by `column`) becomes a column. No threshold is
right for all: see the report in the folder's classifier.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from heliostat.curation import linear
from heliostat.curation.filtering import text_of
from heliostat.curation.stage import Document, Outcome, Stage, Work
from heliostat.schema import Float
from heliostat.tasks import files


class Classifier(Stage):
    """Drops documents that a classifier of one's own finds unlike its good examples."""

    reasons: ClassVar[dict[str, str]] = {"low_score": "a score below min_score"}
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"score": ("min_score",)}
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(min_length=1)
    """The classifier's folder."""
    min_score: Float = Field(0.5, ge=0, le=1)
    """The least score of a document that is kept (`low_score`)."""
    column: str = Field("quality", min_length=1)
    """The column that the score becomes."""

    def identity(self) -> dict[str, Any]:
        digests = {name: files.digest("model", str(Path(self.model) / name)) for name in (linear.ABOUT, linear.WEIGHTS)}
        return super().identity() | {"model": digests}

    def check(self) -> None:
        linear.load(Path(self.model))

    def open(self) -> Work:
        made = linear.load(Path(self.model))

        def outcome(document: Document) -> Outcome:
            score = round(made.score(text_of(document)), 6)
            if score < self.min_score:
                return Outcome(None, "low_score", measures={"score": score})
            document.columns[self.column] = score
            return Outcome(document, measures={"score": score})

        return lambda documents: [outcome(d) for d in documents]
