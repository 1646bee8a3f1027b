"""Builds small image models with random weights, which compute features of images in tests, and finds the weights of lite0."""

from __future__ import annotations

from pathlib import Path

import torch
from heliostat.recipes.images import diffusers_folder, efficientnet_lite
from heliostat.recipes.images.embedder import processor_of_size
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

WIDTH = 12  # features of the image model


def image_model(folder: Path) -> Path:
    torch.manual_seed(5)
    config = ViTConfig(hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                       patch_size=4)  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def clip_model(folder: Path, dataset: Path, length: int = 12) -> Path:
    """Saves a CLIP model for gray images of 8 x 8 pixels, with the dataset's tokenizer."""
    torch.manual_seed(6)
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**part, "max_position_embeddings": length, "vocab_size": 320, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    vision = {**part, "image_size": 8, "patch_size": 4, "num_channels": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).save_pretrained(folder)
    diffusers_folder.tokenizer((dataset / "tokenizer.json").read_bytes(), 0, length).save_pretrained(folder)
    processor_of_size(8, 1).save_pretrained(folder)
    return folder


def lite0() -> Path:
    """Finds the weights of EfficientNet-Lite0 in the package, which tests/requirements.lock has."""
    file = efficientnet_lite.weights_of_package()
    assert file, "install the packages of tests/requirements.lock: make locked"
    return file
