"""Drops images by the score of a Hugging Face model, for example for watermarks, NSFW, aesthetics, or the fit of the caption.

`model` is a folder in the form of save_pretrained, with safetensors and the image processor; heliostat never runs its code.
For an image classifier, the score is the label's probability (softmax, or sigmoid for independent labels), or the output of a
model with one label, such as a grade of aesthetics. For a CLIP, which has no labels, it is the cosine similarity of image and
caption (the CLIP score of Hessel et al. 2021, arXiv 2104.08718); LAION-400M (Schuhmann et al. 2021, arXiv 2111.02114) keeps
0.3 or more by ViT-B/32. Models read images in their stored form. If the cluster has GPUs, each has an actor that keeps the
model; otherwise CPUs compute. Scores don't depend on the batch, but differ in the last digits between devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from heliostat.curation import image_models, scoring
from heliostat.curation.picturing import picture_of
from heliostat.curation.stage import Document, text_of
from heliostat.errors import ConfigError


class HfImage(scoring.ScoringStage):
    of_images: ClassVar[bool] = True
    needs: ClassVar = ("images", "PIL")
    libraries: ClassVar[tuple[str, ...]] = ("pillow", *scoring.ModelStage.libraries)

    label: str | None = Field(None, min_length=1)
    """Label whose score counts, by its name in config.json (`LABEL_0` if it has none). Unset, for a CLIP: how well the caption
    fits the image."""
    batch: int = Field(16, ge=1, le=1024)
    """Batch size in images."""

    def digests(self) -> dict[str, object]:
        return {"model": image_models.digests(self.model)}

    def check(self) -> None:
        super().check()
        config = image_models.describe(self.model)
        if image_models.is_clip(config):
            if self.label is not None:
                raise ConfigError(f"label: {self.model!r} is a CLIP, which has no labels. Remove it: the score rates the caption")
            return
        if self.label is None:
            known = ", ".join(scoring.labels(config))
            raise ConfigError(f"label: {self.model!r} is a classifier. Name one of its labels: {known}")
        scoring.require_label(self.label, config)

    def computing(self) -> Callable[[list[Document]], list[tuple[float]]]:
        scorer = (image_models.CaptionFit(self.model, self.batch) if self.label is None
                  else image_models.ImageLabels(self.model, self.label, self.batch))  # fmt: skip
        return lambda documents: [
            (score,) for score in scorer([picture_of(d).data for d in documents], [text_of(d) for d in documents])
        ]
