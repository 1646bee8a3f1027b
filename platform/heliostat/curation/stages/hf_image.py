"""Drops images by the score that a Hugging Face model gives them: watermarks, NSFW, aesthetics, or how well the caption fits.

`model` is a folder as save_pretrained writes it, with safetensors and the image processor; code of the folder's is never run.
Of an image classifier, the score is the label's probability (softmax, or sigmoid where labels exclude no other), or the output
itself of models with one, such as a grade of aesthetics. Of a CLIP, which has no labels, it is the cosine similarity of image
and caption (the CLIP score of Hessel et al. 2021, arXiv 2104.08718); LAION-400M (Schuhmann et al. 2021, arXiv 2111.02114) keeps
0.3 or more by ViT-B/32. Models look at images in the form that they are stored in. Where the cluster has GPUs, each has an actor
that keeps the model; else CPUs compute. Scores do not depend on the batch, but differ in the last digits between devices.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from heliostat import extras
from heliostat.curation import image_scoring, scoring
from heliostat.curation.filtering import text_of
from heliostat.curation.picturing import picture_of
from heliostat.curation.stage import Document, Outcome, Stage, Work
from heliostat.errors import ConfigError
from heliostat.schema import Float, nearest


class HfImage(Stage):
    """Drops images by the score of a Hugging Face image classifier or CLIP."""

    gpu: ClassVar[bool] = True
    of_images: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {
        "low_score": "a score below min_score",
        "high_score": "a score above max_score",
    }
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"score": ("min_score", "max_score")}
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(min_length=1)
    """The model's folder. Nodes that lack it get a copy of its files, without pickles."""
    label: str | None = Field(None, min_length=1)
    """The label whose score is taken, by its name in config.json (`LABEL_0` where it has none). Unset, of a CLIP: how well the
    caption fits."""
    min_score: Float | None = None
    """The least score of an image that is kept (`low_score`)."""
    max_score: Float | None = None
    """The largest score of an image that is kept (`high_score`)."""
    batch: int = Field(16, ge=1, le=1024)
    """Images that are computed together."""
    column: str = Field("score", min_length=1)
    """The column that the score becomes."""

    @model_validator(mode="after")
    def _one(self) -> HfImage:
        if self.min_score is None and self.max_score is None:
            raise ValueError("give min_score, max_score or both")
        return self

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"model": image_scoring.digests(self.model)}

    def check(self) -> None:
        extras.require("images", "PIL", what="stage hf_image")
        config = image_scoring.describe(self.model)
        if image_scoring.is_clip(config):
            if self.label is not None:
                raise ConfigError(f"label: {self.model!r} is a CLIP, which has no labels; remove it: the score is the caption's")
            return
        known = scoring.labels(config)
        if self.label is None:
            raise ConfigError(f"label: {self.model!r} is a classifier; name one of its labels, {', '.join(known)}")
        if self.label not in known:
            raise ConfigError(f"label: {self.label!r} is none of the model's, {', '.join(known)}{nearest(self.label, known)}")

    def open(self) -> Work:
        self.check()
        scorer = image_scoring.load(self.model, self.label, self.batch)

        def work(documents: list[Document]) -> list[Outcome]:
            scores = scorer([picture_of(d).data for d in documents], [text_of(d) for d in documents])
            return [self._outcome(d, score) for d, score in zip(documents, scores, strict=True)]

        return work

    def _outcome(self, document: Document, score: float) -> Outcome:
        measures = {"score": score}
        if self.min_score is not None and score < self.min_score:
            return Outcome(None, "low_score", measures=measures)
        if self.max_score is not None and score > self.max_score:
            return Outcome(None, "high_score", measures=measures)
        document.columns[self.column] = score
        return Outcome(document, measures=measures)
