"""Drops documents with a low score from a quality classifier that you have trained. The classifier is a linear model on hashed
word n-grams.

GPT-3, successors of CCNet, and DCLM (Li et al. 2024, arXiv 2406.11794) select pages with such a classifier, for example with
fastText. You train the classifier on examples of good documents and of other documents. `heliostat data train-classifier GOOD BAD
--out FOLDER` trains a classifier, and prints its precision and recall on held-out documents. FOLDER then contains safetensors and
JSON files. The stage stores the score in the column that `column` names. The right threshold depends on the data: see the report
in FOLDER/classifier.json.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from heliostat.curation import linear
from heliostat.curation.stage import Document, Outcome, Stage, text_of
from heliostat.schema import Float
from heliostat.tasks import files


class Classifier(Stage):
    libraries: ClassVar[tuple[str, ...]] = ("scikit-learn", "scipy")
    limits: ClassVar = {"low_score": ("score", "min_score", "a score below {}")}
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(min_length=1)
    """Folder of the classifier, from `heliostat data train-classifier`."""
    min_score: Float = Field(0.5, ge=0, le=1)
    """Minimum score; documents with a lower score are dropped (`low_score`)."""
    column: str = Field("quality", min_length=1)
    """Name of the column in which the stage stores the score."""

    def digests(self) -> dict[str, object]:
        return {"model": {name: files.digest("model", str(Path(self.model) / name)) for name in (linear.ABOUT, linear.WEIGHTS)}}

    def check(self) -> None:
        linear.load(Path(self.model))

    def loaded(self) -> Callable[[Document], Outcome]:
        model = linear.load(Path(self.model))

        def outcome(document: Document) -> Outcome:
            score = round(model.score(text_of(document)), 6)
            return self.judged(document, {"score": score}, columns={self.column: score})

        return outcome
