"""Builds small frozen image models of transformers for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

SMALL = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def image_model(folder: Path, kind: str = "vit", side: int = 16, patch: int = 4, channels: int = 12) -> Path:
    """Saves a model with random weights, and the processor for square images of `side` pixels."""
    torch.manual_seed(9)
    small = {**SMALL, "hidden_size": channels, "image_size": side, "patch_size": patch}
    if kind == "vit":
        model: torch.nn.Module = ViTModel(ViTConfig(**small), add_pooling_layer=False)
    elif kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**{k: v for k, v in small.items() if k != "intermediate_size"}))
    elif kind == "clip":
        text = {**SMALL, "vocab_size": 64, "max_position_embeddings": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=small, projection_dim=8))
    else:
        model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, channels], depths=[1, 1], layer_type="basic"))
    model.save_pretrained(folder)  # type: ignore[operator]
    ViTImageProcessor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return folder
