"""Embeds images with a CLIP's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from heliostat.curation import picturing
from heliostat.inference.batch.engines import Answer, Engine, Input, Loaded
from heliostat.recipes.images import clip_folder
from heliostat.recipes.pretrained import from_folder

MODES = {1: "L", 3: "RGB"}


class EmbedImages(Engine):
    """Embeds images, each decoded with its batch; what is no whole PNG, JPEG or WebP is bad."""

    def __init__(self, folder: Path, batch: int) -> None:
        super().__init__(Loaded(folder), batch)
        self.processor = from_folder("model", transformers.AutoImageProcessor, folder, backend="pil")
        self.mode = MODES[self.model.config.vision_config.num_channels]

    def encode(self, text: str) -> list[int]:
        return []  # all images have one length

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        opened = [self._opened(one.image) for one in inputs]
        whole = [image for image in opened if not isinstance(image, Answer)]
        if not whole:
            return opened
        pixels = self.processor(images=whole, return_tensors="pt")["pixel_values"].to(self.model.device)
        made = iter(clip_folder.of_images(self.model, pixels).cpu().numpy())
        return [image if isinstance(image, Answer) else Answer({"embedding": next(made)}) for image in opened]

    def _opened(self, data: bytes) -> Any:
        try:
            return picturing.upright(data).convert(self.mode)
        except Exception as e:  # noqa: BLE001 - Pillow raises errors of many kinds for bytes that are none
            return Answer(bad="undecodable", detail=picturing.fault(e))
