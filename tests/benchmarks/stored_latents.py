"""Measures what int8 latents cost: the error of the latents, and of the pixels that an autoencoder decodes from them.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.stored_latents [--steps 800] [--seeds 1 2]

Trains an AutoencoderKL (4 x 4 pixels per latent, 4 channels) on small drawings, in a plain loop of one process, and encodes
larger held-out drawings. Each type packs and restores the means and log variances as a dataset stores them. Pixels are those of
the means, in levels of 0 to 255. The peak signal-to-noise ratio (PSNR) compares them with the pixels of the exact means, and with
the drawings.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import torch
from diffusers import AutoencoderKL
from heliostat.curation.images import drawings
from heliostat.recipes.images.rows import scaled
from heliostat.recipes.images.stored_arrays import AREA, ArrayFormat, StoredError, StoredType
from PIL import Image

from tests.benchmarks import harness

BLOCKS = [32, 64, 64]
KL_WEIGHT = 1e-6
RATE = 2e-3


def pixels(part: str, side: int) -> torch.Tensor:
    """Reads drawings, fp32 [n, 3, side, side] in [-1, 1]."""
    files = (raw.image for raw in drawings.read(f"{drawings.SCHEME}openmoji/{part}"))
    images = [
        Image.open(io.BytesIO(file)).convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for file in files if file
    ]
    return scaled(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


def trained(images: torch.Tensor, steps: int, batch: int, seed: int) -> Any:
    """Trains with the loss of `heliostat.recipes:Autoencoder`."""
    torch.manual_seed(seed)
    ends = {"down_block_types": ["DownEncoderBlock2D"] * len(BLOCKS), "up_block_types": ["UpDecoderBlock2D"] * len(BLOCKS)}
    vae: Any = AutoencoderKL(3, 3, **ends, block_out_channels=BLOCKS, latent_channels=4, norm_num_groups=8, layers_per_block=1)
    optimizer = torch.optim.AdamW(vae.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(steps):
        some = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(some).latent_dist
        error = (vae.decode(posterior.sample()).sample - some).abs().mean()
        (error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return vae.eval()


def levels(images: torch.Tensor) -> torch.Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    squared = float((a - b).square().mean())
    return 10 * math.log10(255**2 / squared) if squared else math.inf


def measured(vae: Any, images: torch.Tensor) -> Iterator[list[str]]:
    """Yields a row of the table for each type."""
    encoded = torch.cat([vae.encode(some).latent_dist.parameters for some in images.split(32)])
    decoded = levels(torch.cat([vae.decode(some).sample for some in encoded.chunk(2, 1)[0].split(32)]))
    for dtype in get_args(StoredType):
        form = ArrayFormat(tuple(encoded.shape[1:]), dtype, AREA)
        restored = form.unpack(form.pack(encoded)[0])
        errors = [StoredError.between(dtype, *pair) for pair in zip(encoded.chunk(2, 1), restored.chunk(2, 1), strict=True)]
        after = levels(torch.cat([vae.decode(some).sample for some in restored.chunk(2, 1)[0].split(32)]))
        far = (after - decoded).abs()
        yield [dtype, f"{form.row_bytes:,}", *(f"{error.named()['relative_error']:.2%}" for error in errors),
               f"{float(far.mean()):.3f} ({int(far.max())})", f"{psnr(after, decoded):.1f} dB",
               f"{psnr(after, levels(images)):.2f} dB"]  # fmt: skip
    yield ["exact", "", "", "", "", "", f"{psnr(decoded, levels(images)):.2f} dB"]


def main() -> None:
    options = harness.arguments(__doc__, steps=800, batch=16, training_side=32, side=64, seeds=[1, 2])
    torch.set_num_threads(1)
    training, held_out = pixels("train", options.training_side), pixels("held-out", options.side)
    print(f"{len(held_out)} held-out drawings of {options.side} pixels, {options.steps} steps of {options.batch} images")
    harness.head("seed", "type", "bytes per image", "error of means", "error of log variances", "pixels: mean (maximum)",
                 "PSNR to exact", "PSNR to drawing")  # fmt: skip
    for seed in options.seeds:
        vae = trained(training, options.steps, options.batch, seed)
        with torch.no_grad():
            for cells in measured(vae, held_out):
                harness.row(seed, *cells)


if __name__ == "__main__":
    main()
