"""Describes SD3: a transformer with two streams, for the image and for the text (MMDiT, Esser et al. 2024, arXiv 2403.03206).

Initial weights: the authors published no training code, so SD3 keeps the weights of diffusers' constructor.
"""

from __future__ import annotations

from diffusers import SD3Transformer2DModel

from heliostat.recipes.images.backbones.family import Family, Keys


def _derived(keys: Keys) -> Keys:
    return {"caption_projection_dim": keys.get("num_attention_heads", 18) * keys.get("attention_head_dim", 64)}


SD3 = Family(
    SD3Transformer2DModel, "joint_attention_dim", "pooled_projection_dim", outputs=16, patch=2, joins="clips+text",
    derived=_derived,
)  # fmt: skip
