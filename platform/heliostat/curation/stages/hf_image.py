"""Drops images by the score of a Hugging Face model, for example for watermarks, NSFW content, aesthetics, or the fit of the
caption.

`model` is a folder as `save_pretrained` writes it, with safetensors and the image processor. heliostat never runs code from this
folder. For an image classifier, the score is the label's probability (softmax, or sigmoid for independent labels). If a
classifier has only one label, such as a grade of aesthetics, the score is the model's output. For a CLIP, which has no labels,
the score is the cosine similarity of image and caption (the CLIP score of Hessel et al. 2021, arXiv 2104.08718). LAION-400M
(Schuhmann et al. 2021, arXiv 2111.02114) keeps images with a score of 0.3 or more by ViT-B/32. Models read images in their
stored form. If the cluster has GPUs, each GPU has an actor with the model; otherwise the stage runs on CPUs. Scores don't depend
on the batch, but their last digits differ between devices.
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
    """Label whose score is used, by its name in config.json (`LABEL_0` if config.json has no names). Leave `label` unset for a
    CLIP: the score is then the similarity of image and caption."""
    batch: int = Field(16, ge=1, le=1024)
    """Batch size in images."""

    def digests(self) -> dict[str, object]:
        return {"model": image_models.digests(self.model)}

    def check(self) -> None:
        super().check()
        config = image_models.describe(self.model)
        if image_models.is_clip(config):
            if self.label is not None:
                raise ConfigError(f"label: {self.model!r} is a CLIP, which has no labels. Remove `label`")
            return
        if self.label is None:
            known = ", ".join(scoring.labels(config))
            raise ConfigError(f"label: {self.model!r} is a classifier. Set label to one of the classifier's labels: {known}")
        scoring.require_label(self.label, config)

    def computing(self) -> Callable[[list[Document]], list[tuple[float]]]:
        scorer = (image_models.CaptionFit(self.model, self.batch) if self.label is None
                  else image_models.ImageLabels(self.model, self.label, self.batch))  # fmt: skip
        return lambda documents: [
            (score,) for score in scorer([picture_of(d).data for d in documents], [text_of(d) for d in documents])
        ]
