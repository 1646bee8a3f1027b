"""Trains an AutoencoderKL of `diffusers` on text-to-image datasets, so that latent diffusion starts from scratch, without
downloads.

    recipe: heliostat.recipes:Autoencoder
    model: {block_out_channels: [32, 64], latent_channels: 4, kl_weight: 1.0e-6, ...}      # any key of AutoencoderKL; or
    model: {pretrained: FOLDER, kl_weight: 1.0e-6}

A sample's loss has two terms. The first is the mean absolute error of its reconstruction. The second is `kl_weight` times the
mean divergence of its latents from a standard normal distribution (Kingma and Welling 2013, arXiv 1312.6114).

The export is a plain diffusers folder. The export's `scaling_factor` scales latents of the training images to a standard
deviation of 1. Text-to-image jobs use the folder in `model.autoencoder: {pretrained: FOLDER}`, and image pipelines in `latents:`.
"""

from __future__ import annotations

import base64
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from torch import nn

from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes import partitioning
from heliostat.recipes.images import rows
from heliostat.recipes.images.config import folder_config, load_or_build
from heliostat.recipes.images.diffusers_folder import REQUIREMENTS
from heliostat.recipes.images.grids import grid, png
from heliostat.recipes.images.judge import real_images
from heliostat.recipes.pretrained import whole_part
from heliostat.recipes.protocol import Batch, Draws, Evaluates, Loss, Recipe, Serves, Serving
from heliostat.schema import nearest
from heliostat.text import brief

BUILT_IN = {"Autoencoder": ("diffusers",)}
SHOWN = 8  # images in the grid, each above its reconstruction
SCALED = 256  # images to measure the scaling factor


class Coder(nn.Module):
    """Encodes images, samples latents with the given noise, and decodes the latents, in one forward pass. Returns the
    reconstructions, and the parameters of the latents' distribution."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vae: Any = self.vae
        parameters = vae.encode(pixels).latent_dist.parameters
        mean, logvar = parameters.chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
        return vae.decode(latents).sample, parameters


class Autoencoder(Recipe, Evaluates, Serves, Draws):
    kind = "rows"
    terms_per_sample = 1
    scores = ("loss", "error", "divergence", "psnr")
    layout = {"vae.": "diffusion_pytorch_model"}

    def __init__(self, job: Job) -> None:
        if job.data.sequence_length:
            raise ConfigError("data.sequence_length: not used for images. Remove this key")
        self.keys = {k: v for k, v in job.model.items() if k not in ("kl_weight", "pretrained")}
        self.pretrained = job.model.get("pretrained")
        self.kl_weight = job.model.get("kl_weight", 1e-6)
        if not isinstance(self.kl_weight, int | float) or self.kl_weight < 0:
            raise ConfigError(f"model.kl_weight: expected a number of at least 0, got {self.kl_weight!r}")
        known = list(inspect.signature(AutoencoderKL.__init__).parameters)[1:]
        for key in self.keys:
            if self.pretrained or key not in known:
                what = (
                    "a pretrained autoencoder takes its configuration from its folder. Remove this key"
                    if self.pretrained
                    else "unknown key"
                )
                raise ConfigError(f"model.{key}: {what}{'' if self.pretrained else nearest(key, known)}")
        if self.pretrained:
            self.config = folder_config("model.pretrained", self.pretrained)
        else:
            blocks = len(self.keys.get("block_out_channels", [64]))
            types = {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
            self.config = {"block_out_channels": [64], "latent_channels": 4, **types, **self.keys}
        self.seed, self.checkpointing = job.train.seed, job.train.activation_checkpointing
        self.version = job.train.rules

    def bind(self, sources: list[Manifest]) -> None:
        self.sources, self.facts = sources, rows.facts(sources, True)
        if self.facts.content != "images":
            raise ConfigError(
                "data.sources: an autoencoder needs images, but these datasets contain latents. "
                "Prepare the datasets without `latents`"
            )
        channels = self.facts.channels
        if self.pretrained:
            if self.config["in_channels"] != channels:
                raise ConfigError(
                    f"model.pretrained: the autoencoder needs images with {self.config['in_channels']} channels, but the "
                    f"datasets' images have {channels}. Set `channels` in the pipeline, or use another autoencoder"
                )
        else:
            self.config = {**self.config, "in_channels": channels, "out_channels": channels, "sample_size": self.facts.size[0]}
        for side in self.facts.size:
            if side % self.factor:
                blocks = len(self.config["block_out_channels"])
                raise ConfigError(
                    f"model.block_out_channels: {blocks} blocks need image sides that are multiples of "
                    f"{self.factor}, but the images have a side of {side} pixels. "
                    "Use fewer blocks, or prepare images of another `resolution`"
                )
        with torch.device("meta"):
            self.build()  # fails if the keys don't fit together

    @property
    def factor(self) -> int:
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def build(self) -> nn.Module:
        if self.pretrained:
            vae = load_or_build(AutoencoderKL, self.pretrained)
        else:
            try:
                with partitioning.constructing():
                    vae = AutoencoderKL(**self.config)
            except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError, RuntimeError) as e:
                raise ConfigError(f"model: {brief(e)}") from e
        if self.checkpointing:
            vae.enable_gradient_checkpointing()
        return Coder(vae).train()

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: pa.Table, keys: np.ndarray) -> Batch:
        pixels = rows.pixels(content)
        if self.version > 1:
            return {"pixels": pixels, "key": torch.from_numpy(keys.astype(np.int64))}
        return {"pixels": pixels, "noise": rows.draw_on_host(self.seed, keys, self._latent(pixels), 0.0, 0.0, False).noise}

    def complete(self, batch: Batch) -> Batch:
        if "noise" in batch:
            return batch
        noise = rows.draw(self.seed, batch["key"], self._latent(batch["pixels"]), 0.0, 0.0, False).noise
        return {"pixels": batch["pixels"], "noise": noise}

    def _latent(self, pixels: torch.Tensor) -> tuple[int, int, int]:
        """Returns the shape of one image's latents."""
        return self.config["latent_channels"], pixels.shape[2] // self.factor, pixels.shape[3] // self.factor

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        error, divergence, _ = self._errors(model, batch)
        return Loss((error + self.kl_weight * divergence).sum())

    def _errors(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes three errors of each sample: mean absolute error, mean divergence from a standard normal distribution, and
        mean squared error. Each is fp32 [samples]."""
        batch, dtype = self.complete(batch), next(model.parameters()).dtype
        decoded, parameters = model(batch["pixels"].to(dtype), batch["noise"].to(dtype))
        mean, logvar = parameters.float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        difference = decoded.float() - batch["pixels"]
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return difference.abs().flatten(1).mean(1), divergence.flatten(1).mean(1), difference.square().flatten(1).mean(1)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        error, divergence, squared = self._errors(model, batch)
        return {"error": error, "divergence": divergence, "squared": squared, "samples": torch.ones_like(error)}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        n = sums["samples"]
        error, divergence = sums["error"] / n, sums["divergence"] / n
        psnr = 10 * math.log10(4 / max(sums["squared"] / n, 1e-10))  # pixel values have a range of 2
        return {"loss": error + self.kl_weight * divergence, "error": error, "divergence": divergence, "psnr": psnr}

    def flops_per_sample(self, model: nn.Module) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        width, height = self.facts.size
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            latents = (1, self.config["latent_channels"], height // self.factor, width // self.factor)
            self.build()(torch.zeros((1, self.facts.channels, height, width)), torch.zeros(latents))
        return 3.0 * counter.get_total_flops()

    # for people ------------------------------------------------------------------------------------------------------

    def describe(self, content: pa.Table) -> str:
        row = content.select(["id", "caption"]).to_pylist()[0]
        return f"{row['caption']} ({row['id']})"

    def gallery(self) -> Reconstructions:
        return Reconstructions(self)

    def save_config(self, folder: Path) -> None:
        with torch.device("meta"):
            model: Any = self.build()
        model.vae.save_config(folder)
        measured = 1 / self._deviation(self.load(folder))
        model.vae.register_to_config(scaling_factor=measured)
        model.vae.save_config(folder)

    @torch.no_grad()
    def _deviation(self, model: Any) -> float:
        """Measures the standard deviation of the latents of some training images."""
        images = np.stack([i for i in real_images(self.sources, SCALED)[0] if i.shape[:2] == self.facts.size[::-1]])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return float(torch.cat([model.vae.encode(part).latent_dist.mean for part in pixels.split(32)]).std())

    def load(self, folder: Path) -> nn.Module:
        return Coder(whole_part(AutoencoderKL, folder, torch.float32).eval())

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        scale = folder_config("model", str(folder))["scaling_factor"]
        return [
            ("autoencoder", f"each latent encodes a square of {self.factor} x {self.factor} pixels; scaling factor {scale:.4g}")
        ]

    @staticmethod
    def exported(folder: Path, model: dict[str, object]) -> dict[str, object]:
        return {"pretrained": str(folder), "kl_weight": model.get("kl_weight", 1e-6)}

    def serving(self) -> Serving:
        from mlflow.models import infer_signature

        example = [base64.b64encode(png(real_images(self.sources, 1)[0][0])).decode()]
        code = Path(__file__).with_name("autoencoder_server.py")
        return Serving(code, example, infer_signature(example, example), REQUIREMENTS)


class Reconstructions:
    """Generates reconstructions of some images. Each reconstruction is below its original image."""

    def __init__(self, recipe: Autoencoder) -> None:
        self.recipe, self.count = recipe, SHOWN
        pictures = [i for i in real_images(recipe.sources, 64)[0] if i.shape[:2] == recipe.facts.size[::-1]]
        self.images = [pictures[n % len(pictures)] for n in range(SHOWN)]

    def draw(self, model: nn.Module, device: torch.device | str, numbers: list[int]) -> list[np.ndarray]:
        dtype = next(model.parameters()).dtype
        pixels = torch.from_numpy(np.stack([self.images[n] for n in numbers])).permute(0, 3, 1, 2).float() / 127.5 - 1
        shape = (len(numbers), self.recipe.config["latent_channels"], *(s // self.recipe.factor for s in pixels.shape[2:]))
        decoded, _ = model(pixels.to(device, dtype), torch.zeros(shape, device=device, dtype=dtype))
        after = ((decoded.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [np.concatenate([self.images[n], after[i]], axis=0) for i, n in enumerate(numbers)]

    def judge(
        self, pictures: list[np.ndarray], progressed: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], dict[str, bytes]]:
        return {}, {"reconstructions": png(grid(pictures, SHOWN))}
