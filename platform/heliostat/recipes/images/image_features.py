"""Computes the features of an image's patches with a frozen image model of transformers.

Every image is resized to the model's square input. So the grid of patches covers the whole image, also if the image isn't square.
Models with tokens (ViT, DINOv2, the image half of CLIP) and models with maps (ResNet, ConvNeXt) work. Tokens before the patches,
such as the class token, are left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from heliostat.errors import ConfigError
from heliostat.recipes.precision import compute_dtype
from heliostat.recipes.pretrained import from_folder

KEY = "latents.features.encoder"


class PatchFeatures:
    """Computes features with the model in a folder. `grid`: rows and columns of the patches. `channels`: of a patch's
    features."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        processor = from_folder(KEY, AutoImageProcessor, folder)
        model = from_folder(KEY, AutoModel, folder, dtype=compute_dtype(folder))
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False).to(device)
        self.device, self.side = device, input_side(processor)
        self._mean, self._std = (torch.tensor(one, device=device).view(1, 3, 1, 1) for one in _statistics(processor))
        blank = self(torch.zeros(1, 3, self.side, self.side))
        self.grid, self.channels = (blank.shape[1], blank.shape[2]), blank.shape[3]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Computes the features of images in [-1, 1], [n, 1 or 3, height, width]. Returns fp32 [n, rows, columns, channels]."""
        pixels = (images.to(self.device).expand(-1, 3, -1, -1) + 1) / 2
        size = (self.side, self.side)
        if pixels.shape[2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        hidden = self.model(pixel_values=(pixels - self._mean) / self._std).last_hidden_state.float()
        if hidden.dim() == 4:
            return hidden.permute(0, 2, 3, 1).contiguous()
        patch = getattr(self.model.config, "patch_size", None)
        return patches(hidden, self.side // patch if isinstance(patch, int) else math.isqrt(hidden.shape[1]))


def patches(hidden: torch.Tensor, side: int) -> torch.Tensor:
    """Returns the patches' part of a model's tokens [n, tokens, channels] as a square map. The patches are the last tokens."""
    return hidden[:, hidden.shape[1] - side * side :].unflatten(1, (side, side))


def input_side(processor: Any) -> int:
    """Returns the side of the square image that a model's processor makes, in pixels."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = dict(crop or processor.size or {})
    side = size.get("height") or size.get("shortest_edge")
    if not side:
        raise ConfigError(f"{KEY}: preprocessor_config.json has no size of square images ({size}). Set `size` in this file")
    return int(side)


def _statistics(processor: Any) -> tuple[list[float], list[float]]:
    """Returns the mean and the standard deviation by which a processor normalizes pixels in [0, 1]."""
    if not getattr(processor, "do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return list(processor.image_mean), list(processor.image_std)
