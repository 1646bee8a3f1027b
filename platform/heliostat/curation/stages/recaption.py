"""Replaces captions with the output of a Hugging Face captioning model. A separate column contains the original captions.

Generated captions describe images better than most alt texts on the web (BLIP: Li et al. 2022, arXiv 2201.12086; Nguyen et al.
2023, arXiv 2307.10350; Li et al. 2024, arXiv 2406.08478). `model` is a folder as `save_pretrained` writes it (BLIP, GIT, or a
vision encoder with a text decoder), with safetensors, the image processor, and tokenizer.json. heliostat never runs code from
this folder. The model reads images in their stored form. Decoding is greedy. Captions don't depend on the batch, but may differ
between devices if two words are about equally likely. If the cluster has GPUs, each GPU has an actor with the model; otherwise
the stage runs on CPUs. Later stages read the new captions: to score these with a CLIP, put `hf_image` after this stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from heliostat.curation import image_models
from heliostat.curation.picturing import picture_of
from heliostat.curation.scoring import ModelStage
from heliostat.curation.stage import Document, Outcome, text_of


class Recaption(ModelStage):
    gpu: ClassVar[bool] = True
    of_images: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {"no_caption": "an image of which the model wrote nothing"}
    needs: ClassVar = ("images", "PIL")
    libraries: ClassVar[tuple[str, ...]] = ("pillow", *ModelStage.libraries)

    max_tokens: int = Field(64, ge=1)
    """Maximum tokens of a caption. The dataset's report has the number of truncated captions."""
    batch: int = Field(16, ge=1, le=1024)
    """Batch size in images."""
    original: str = Field("original_caption", min_length=1)
    """Column of the shards with the original caption from the input."""

    def digests(self) -> dict[str, object]:
        return {"model": image_models.digests(self.model)}

    def stored(self) -> tuple[str, ...]:
        return (self.original,)

    def check(self) -> None:
        super().check()
        image_models.require_captioner(self.model)

    def computing(self) -> Callable[[list[Document]], list[tuple[str, bool]]]:
        write = image_models.Captioner(self.model, self.max_tokens, self.batch)
        return lambda documents: write([picture_of(d).data for d in documents])

    def outcome(self, document: Document, caption: str, cut: bool) -> Outcome:
        counts = {"cut_to_max_tokens": 1} if cut else {}
        if not caption:
            return Outcome(None, "no_caption")
        old = text_of(document)
        columns = document.columns | {self.original: old}
        counts["same_caption" if caption == old else "recaptioned"] = 1
        return Outcome(Document(document.id, caption, columns, document.picture), counts=counts)
