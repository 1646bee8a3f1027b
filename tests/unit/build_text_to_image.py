"""Builds text-to-image recipes, samples, and small frozen models for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset, plan
from heliostat.recipes.images import diffusers_folder
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from tests.unit import build_images
from tests.unit.build_images import FLUX, LUMINA, PIXART, PRX, SANA, SD3, UNET
from tests.unit.build_job import job

CANVAS = {**UNET, "arch": "canvas", "sample_size": 8, "encoder_hid_dim_type": "text_proj"}
BACKBONES = {
    "unet": UNET,
    "canvas": CANVAS,
    "pixart": PIXART,
    "sd3": SD3,
    "flux": FLUX,
    "lumina": LUMINA,
    "sana": SANA,
    "prx": PRX,
}


def recipe(dataset: Path, **model: Any) -> TextToImage:
    made = TextToImage(job(**build_images.job(dataset, **model)))
    made.bind([manifest.read(Location(str(dataset)))])
    return made


def woken(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model with random numbers in place of its initial zeros, with which every output is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def export(made: TextToImage, model: torch.nn.Module, folder: Path) -> Path:
    """Writes a model's folder for diffusers: its weights as `export` stores them, and everything else as the recipe saves it."""
    made.save_config(folder)
    for prefix, file in made.layout.items():
        mine = {n.removeprefix(prefix): t.contiguous() for n, t in model.state_dict().items() if n.startswith(prefix)}
        if mine:  # a frozen encoder's weights are those of its folder
            save_file(mine, folder / f"{file}.safetensors", {"format": "pt"})
    return folder


def rows(dataset: Path, count: int = 12) -> Any:
    made = plan(job(**build_images.job(dataset)), [manifest.read(Location(str(dataset)))])
    data = open_dataset(made)
    return data.read(data.order.locate(np.arange(count)))


def autoencoder(folder: Path, channels: int = 3, **keys: Any) -> Path:
    """Saves an AutoencoderKL with random weights, whose latents have half the image's sides. `keys`: of its configuration."""
    torch.manual_seed(3)
    blocks = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    usual = {"latent_channels": 4, "norm_num_groups": 4, "sample_size": 16, **blocks}
    AutoencoderKL(channels, channels, **{**usual, **keys}).save_pretrained(folder)
    return folder


def clip(folder: Path, dataset: Path, width: int = 16) -> Path:
    torch.manual_seed(4)
    config = CLIPTextConfig(vocab_size=320, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                            max_position_embeddings=8)  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    diffusers_folder.tokenizer((dataset / "tokenizer.json").read_bytes(), 0, 8).save_pretrained(folder)
    return folder


def bert(folder: Path, dataset: Path, length: int, width: int) -> Path:
    torch.manual_seed(6)
    config = BertConfig(vocab_size=320, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                        max_position_embeddings=16)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    diffusers_folder.tokenizer((dataset / "tokenizer.json").read_bytes(), 0, length).save_pretrained(folder)
    return folder
