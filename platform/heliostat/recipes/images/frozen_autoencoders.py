"""Reads the frozen autoencoders of text-to-image jobs and image pipelines: AutoencoderKL, with any number of channels and with a
shift of the latents, and AutoencoderDC (Sana's deep autoencoder, Chen et al. 2024, arXiv 2410.10733).

AutoencoderKL encodes an image to the mean and the log variance of a normal distribution of latents. AutoencoderDC encodes an
image to latents.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL

from heliostat.errors import ConfigError

Keys = dict[str, Any]  # of a diffusers configuration
CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}


def kind(key: str, config: Keys) -> Any:
    """Returns the class of an autoencoder with this configuration. Raises ConfigError, with `key` at its beginning, for another
    class."""
    name = config.get("_class_name", "AutoencoderKL")
    if name not in CLASSES:
        raise ConfigError(f"{key}: a {name!r} isn't a supported autoencoder. Use {' or '.join(CLASSES)}")
    return CLASSES[name]


def factor(config: Keys) -> int:
    """Returns the side, in pixels, of the image square that one latent encodes."""
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return int(2 ** (len(blocks) - 1))


def moments(config: Keys) -> int:
    """Returns the numbers that describe one latent: 2 for AutoencoderKL (mean and log variance), 1 for AutoencoderDC."""
    return 1 if config.get("_class_name") == "AutoencoderDC" else 2


def quantities(config: Keys) -> tuple[str, ...]:
    """Returns the names of the quantities that `encode` returns one after the other: the latents, or their mean and log
    variance."""
    return ("latent", "latent_log_variance")[: moments(config)]


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encodes pixels as `moments` describes: [n, moments x channels, height, width]."""
    out = vae.encode(pixels)
    latents: torch.Tensor = out.latent_dist.parameters if hasattr(out, "latent_dist") else out.latent
    return latents


def scaled(config: Keys, content: torch.Tensor, posterior: torch.Tensor | None) -> torch.Tensor:
    """Converts what `encode` returns to the latents that a model learns, with the autoencoder's shift and scale. `posterior`: the
    normal numbers that select latents from their distribution, for AutoencoderKL."""
    if moments(config) == 1:
        return content * config.get("scaling_factor", 1.0)
    assert posterior is not None
    mean, logvar = content.chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior
    return (latents - (config.get("shift_factor") or 0.0)) * config.get("scaling_factor", 0.18215)
