"""Embeds texts and images with the CLIP model in a folder, as vectors of length 1 in one space, in the same way as the recipe
`ImageEmbedder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import CLIPModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling


def is_one(folder: Path) -> bool:
    """Checks whether a folder contains a CLIP model."""
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("model_type") == "clip"


def of_texts(model: CLIPModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Embeds texts, fp32 [texts, width]."""
    return _of_length_one(model.get_text_features(input_ids=ids, attention_mask=mask))


def of_images(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Embeds preprocessed images, fp32 [images, width]."""
    return _of_length_one(model.get_image_features(pixel_values=pixels))


def _of_length_one(output: torch.Tensor | BaseModelOutputWithPooling) -> torch.Tensor:
    vectors = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert vectors is not None
    return F.normalize(vectors.float(), dim=-1)
