"""Describes Sana: a transformer with linear attention and convolutions, for latents of a deep autoencoder (Xie et al. 2024, arXiv
2410.10629).

Initial weights: `initialize` of `SanaMS` in NVlabs/Sana: Xavier-uniform in linear layers and in the layer that embeds patches, a
standard deviation of 0.02 in the layers of the timestep and the captions. The 1 x 1 convolutions keep torch's weights.
"""

from __future__ import annotations

from typing import Any

from diffusers import SanaTransformer2DModel

from heliostat.recipes.images.backbones.family import Family, Keys, Weights, cross_attending, patches


def _derived(keys: Keys) -> Keys:
    return {"cross_attention_dim": keys.get("num_attention_heads", 70) * keys.get("attention_head_dim", 32)}


def _fault(keys: Keys, pretrained: bool) -> str | None:
    if keys.get("guidance_embeds"):
        return "guidance_embeds: not supported: only distillation trains these embeddings. Use a model without them"
    return None


def _initial(backbone: Any) -> Weights:
    yield from cross_attending(backbone, backbone.time_embed, backbone.caption_projection)
    yield from patches(backbone.patch_embed.proj)


SANA = Family(
    SanaTransformer2DModel, "caption_channels", outputs=32, masks=True, masked=True,
    derived=_derived, fault=_fault, initial=_initial,
)  # fmt: skip
