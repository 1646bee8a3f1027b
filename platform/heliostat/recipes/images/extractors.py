"""Computes features of images with frozen models: EfficientNet-Lite0, an image model of `transformers`, or CLIP.

A model is on the device only while it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from heliostat.errors import ConfigError
from heliostat.recipes.exported import using
from heliostat.recipes.images import clip_folder, efficientnet_lite
from heliostat.recipes.pretrained import from_folder, whole
from heliostat.recipes.text import masks

LITE0 = "lite0"
EXTRACTOR, CLIP = "model.samples.features.extractor", "model.samples.clip.pretrained"
AT_ONCE = 32  # images per batch
WIDTHS = ("hidden_size", "hidden_dim", "projection_dim")  # keys of configurations that contain the number of features


class Extractor(Protocol):
    """Computes features, fp32 [n, width], of images (uint8 [height, width, channels]) with `model`, on the model's device."""

    model: Any

    def __call__(self, pictures: list[np.ndarray]) -> np.ndarray: ...


def require(extractor: str) -> None:
    """Raises ConfigError if an extractor's weights or folder are missing. Loads no weights."""
    if extractor == LITE0:
        if efficientnet_lite.weights_of_package() is None:
            efficientnet_lite.load(EXTRACTOR)
    else:
        _require_folder(EXTRACTOR, extractor)


def require_clip(folder: str) -> None:
    """Raises ConfigError if a folder doesn't contain a CLIP model."""
    _require_folder(CLIP, folder)
    if not clip_folder.is_one(Path(folder)):
        raise ConfigError(f"{CLIP}: {folder!r} isn't a CLIP model. Use a folder whose config.json has model_type: clip")


def _require_folder(key: str, folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{key}: {folder!r} isn't a model folder (no config.json). heliostat doesn't download from the Hub. "
            f"Run: hf download NAME --local-dir {folder}")  # fmt: skip


def width(extractor: str) -> int | None:
    """Returns an extractor's number of features, from its configuration. Returns None if the configuration is missing, or doesn't
    have this number."""
    if extractor == LITE0:
        return efficientnet_lite.WIDTH
    if not (Path(extractor) / "config.json").is_file():
        return None
    from transformers import AutoConfig

    with using(Path(extractor)):
        config = from_folder(EXTRACTOR, AutoConfig, extractor)
    if clip_folder.is_one(Path(extractor)):
        return int(config.projection_dim)
    if sizes := getattr(config, "hidden_sizes", None):
        return int(sizes[-1])
    return next((int(getattr(config, key)) for key in WIDTHS if getattr(config, key, None)), None)


def load(extractor: str) -> Extractor:
    """Loads an extractor. Raises ConfigError if the extractor can't be loaded."""
    require(extractor)
    if extractor == LITE0:
        return _Lite0()
    return ClipModel(extractor, EXTRACTOR) if clip_folder.is_one(Path(extractor)) else _ImageFolder(extractor)


class _Lite0:
    def __init__(self) -> None:
        self.model: Any = efficientnet_lite.load(EXTRACTOR)

    def __call__(self, pictures: list[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([_resized(p, efficientnet_lite.SIDE) for p in pictures]))
        return self.model(pixels.to(_device(self.model)).permute(0, 3, 1, 2).float()).cpu().numpy()


class _ImageFolder:
    """Computes the pooled output of an image model of `transformers`."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        with using(Path(folder)):
            self.processor = from_folder(EXTRACTOR, AutoImageProcessor, folder)
            self.model: Any = whole(EXTRACTOR, AutoModel, folder).eval()

    def __call__(self, pictures: list[np.ndarray]) -> np.ndarray:
        output = self.model(**self.processor(images=[_color(p) for p in pictures], return_tensors="pt").to(_device(self.model)))
        if getattr(output, "pooler_output", None) is None:
            raise ConfigError(f"{EXTRACTOR}: {type(self.model).__name__} has no pooled output. Use another image model")
        return output.pooler_output.flatten(1).float().cpu().numpy()


class ClipModel:
    """Embeds images and captions with a CLIP model, as vectors of length 1."""

    def __init__(self, folder: str, key: str = CLIP) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        with using(Path(folder)):
            self.model: Any = whole(key, CLIPModel, folder).eval()
            self.processor = from_folder(key, AutoImageProcessor, folder, backend="pil")
            self.tokenizer = from_folder(key, AutoTokenizer, folder)
        self.mode = "L" if self.model.config.vision_config.num_channels == 1 else "RGB"
        self.longest = self.model.config.text_config.max_position_embeddings

    def __call__(self, pictures: list[np.ndarray]) -> np.ndarray:
        opened = [_opened(p).convert(self.mode) for p in pictures]
        pixels = torch.cat([self.processor(images=[one], return_tensors="pt")["pixel_values"] for one in opened])
        return clip_folder.of_images(self.model, pixels.to(_device(self.model))).cpu().numpy()

    def captions(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embeds captions, fp32 [n, width]. Also returns which captions are truncated, because they are longer than the model's
        maximum, bool [n]."""
        cut = np.array([len(ids) > self.longest for ids in self.tokenizer(texts)["input_ids"]])
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        tokens = tokens.to(_device(self.model))
        with masks.unread(whole=True):
            return clip_folder.of_texts(self.model, tokens.input_ids, tokens.attention_mask).cpu().numpy(), cut


@contextmanager
def on(device: torch.device | str, *models: Any) -> Iterator[None]:
    """Moves models to a device for the context, in which torch computes no gradients. Then moves the models back to the CPU."""
    try:
        for model in models:
            model.to(device)
        with torch.no_grad():
            yield
    finally:
        for model in models:
            model.to("cpu")


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _opened(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture.squeeze(2) if picture.ndim == 3 and picture.shape[2] == 1 else picture)


def _color(picture: np.ndarray) -> np.ndarray:
    return picture.repeat(3, 2) if picture.shape[2] == 1 else picture


def _resized(picture: np.ndarray, side: int) -> np.ndarray:
    """Resizes an image to a square, uint8 [side, side, 3], with Pillow's antialiased bicubic filter (Parmar et al. 2022)."""
    return np.asarray(_opened(picture).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def thumbnails(pictures: list[np.ndarray], side: int) -> np.ndarray:
    """Scales images to `side` x `side` pixels by averaging. Returns fp32 [n, side * side * channels], from 0 to 1."""
    small = [np.asarray(_opened(p).resize((side, side), Image.Resampling.BOX), dtype=np.float32).ravel() for p in pictures]
    return np.stack(small) / 255
