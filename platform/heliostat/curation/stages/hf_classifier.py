"""Drops documents by the score that a Hugging Face sequence classifier gives them: of quality, education, toxicity, a domain.

(FineWeb-Edu: Penedo et al. 2024, arXiv 2406.17557, keeps what a small BERT grades 3 of 5 or more; DCLM and Nemotron-CC have their
own.) `model` is a local folder as save_pretrained writes it, with safetensors and tokenizer.json; code of the folder's is never
run. The score is the label's probability (softmax, or sigmoid where labels exclude no other), or the output itself of models with
one. Only the first `max_tokens` of a document are looked at, which is counted. Where the cluster has GPUs, each has an actor
that keeps the model; else CPUs compute. Scores do not depend on the batch, but differ in the last digits between devices.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from heliostat.curation import scoring
from heliostat.curation.filtering import text_of
from heliostat.curation.stage import Document, Outcome, Stage, Work
from heliostat.errors import ConfigError
from heliostat.schema import Float, nearest


class HfClassifier(Stage):
    """Drops documents by the score of a Hugging Face sequence classifier."""

    gpu: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {
        "low_score": "a score below min_score",
        "high_score": "a score above max_score",
    }
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"score": ("min_score", "max_score")}
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(min_length=1)
    """The model's folder. Nodes that lack it get a copy of its files, without pickles."""
    label: str = Field(min_length=1)
    """The label whose score is taken, by its name in config.json (`LABEL_0` where it has none)."""
    min_score: Float | None = None
    """The least score of a document that is kept (`low_score`)."""
    max_score: Float | None = None
    """The largest score of a document that is kept (`high_score`)."""
    max_tokens: int = Field(512, ge=8)
    """The tokens of a document that are looked at."""
    batch: int = Field(8, ge=1, le=1024)
    """Documents of about one length that are computed together."""
    column: str = Field("score", min_length=1)
    """The column that the score becomes."""

    @model_validator(mode="after")
    def _one(self) -> HfClassifier:
        if self.min_score is None and self.max_score is None:
            raise ValueError("give min_score, max_score or both")
        return self

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"model": scoring.digests(self.model)}

    def check(self) -> None:
        config = scoring.describe(self.model)
        known = scoring.labels(config)
        if self.label not in known:
            raise ConfigError(f"label: {self.label!r} is none of the model's, {', '.join(known)}{nearest(self.label, known)}")
        scoring.check_length(config, self.max_tokens)

    def open(self) -> Work:
        self.check()
        scorer = scoring.Scorer(self.model, self.label, self.max_tokens, self.batch)

        def outcome(document: Document, score: float, cut: bool) -> Outcome:
            measures, counts = {"score": score}, {"cut_to_max_tokens": 1} if cut else {}
            if self.min_score is not None and score < self.min_score:
                return Outcome(None, "low_score", measures=measures, counts=counts)
            if self.max_score is not None and score > self.max_score:
                return Outcome(None, "high_score", measures=measures, counts=counts)
            document.columns[self.column] = score
            return Outcome(document, measures=measures, counts=counts)

        def work(documents: list[Document]) -> list[Outcome]:
            return [outcome(d, *made) for d, made in zip(documents, scorer([text_of(d) for d in documents]), strict=True)]

        return work
