"""Trains on patches of pixels: each square of `patch` x `patch` pixels becomes one position with more channels.

A smaller grid makes convolutions cheaper, and loses no information (Shi et al. 2016, arXiv 1609.05158). Noise is added to the
patches. It has the same distribution as noise that is added to the pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from heliostat.errors import ConfigError


def check(patch: int, sizes: list[tuple[int, int]], has_autoencoder: bool) -> None:
    """Raises ConfigError if the patches don't fit the images. `sizes`: width and height of each dataset's images in pixels."""
    if patch > 1 and has_autoencoder:
        raise ConfigError(f"model.patch: {patch} doesn't apply to latents. Remove model.patch, or model.autoencoder")
    for size in sizes:
        if size[0] % patch or size[1] % patch:
            raise ConfigError(
                f"model.patch: {patch} doesn't divide the image side of {size[0]}x{size[1]} pixels. Use a divisor of both sides"
            )


def shape(patch: int, channels: int, size: tuple[int, int]) -> tuple[int, int, int]:
    """Returns the channels, height, and width of an image's patches. `size`: width and height in pixels."""
    return channels * patch * patch, size[1] // patch, size[0] // patch


def cut(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """Returns the patches of images [n, channels, height, width]: [n, channels * patch^2, height / patch, width / patch]."""
    return F.pixel_unshuffle(pixels, patch) if patch > 1 else pixels
