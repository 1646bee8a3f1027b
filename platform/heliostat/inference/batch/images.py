"""Embeds images with a CLIP model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from heliostat.curation import picturing
from heliostat.inference.batch.engines import Answer, BatchEngine, Input, LoadedModel
from heliostat.recipes.images import clip_folder
from heliostat.recipes.pretrained import from_folder

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}
MOST_RATIO = 100  # ratio of an image's sides: resizing scales the shorter side to the model's size, so the longer side gets large


class EmbedImages(BatchEngine):
    """Embeds images, decoded and resized one by one. An image that isn't a complete PNG, JPEG, or WebP file counts as bad."""

    def __init__(self, folder: Path, batch: int) -> None:
        super().__init__(LoadedModel(folder), batch)
        self.processor = from_folder("model", transformers.AutoImageProcessor, folder, backend="pil")
        self.mode = MODES[self.model.config.vision_config.num_channels]

    def encode(self, text: str) -> list[int]:
        return []  # all images have the same length

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        opened = [self._pixels(one.image) for one in inputs]
        whole = [pixels for pixels in opened if not isinstance(pixels, Answer)]
        vectors = iter(clip_folder.of_images(self.model, torch.cat(whole).to(self.model.device)).cpu().numpy() if whole else [])
        return [one if isinstance(one, Answer) else Answer({"embedding": next(vectors)}) for one in opened]

    def _pixels(self, data: bytes) -> torch.Tensor | Answer:
        image = self._opened(data)
        return image if isinstance(image, Answer) else self.processor(images=[image], return_tensors="pt")["pixel_values"]

    def _opened(self, data: bytes) -> Image | Answer:
        try:
            size = picturing.opened(data).size
            if max(size) > MOST_RATIO * min(size):
                return Answer(
                    bad="undecodable", detail=f"{size[0]} by {size[1]} pixels: one is over {MOST_RATIO} times the other"
                )
            return picturing.upright(data).convert(self.mode)
        except Exception as e:  # noqa: BLE001 - Pillow raises many kinds of errors for invalid bytes
            return Answer(bad="undecodable", detail=picturing.fault(e))
