"""Describes PixArt: a diffusion transformer (DiT) with cross-attention to the text.

Initial weights: `initialize_weights` of PixArt-alpha/PixArt-alpha (Chen et al. 2023, arXiv 2310.00426). It is DiT's
initialization (Peebles and Xie 2022, arXiv 2212.09748), and in addition, the output of cross-attention begins as zero.
"""

from __future__ import annotations

from typing import Any

from diffusers import PixArtTransformer2DModel

from heliostat.recipes.images.backbones.family import SIZE, Family, Keys, Weights, cross_attending, patches


def _derived(keys: Keys) -> Keys:
    inner = keys.get("num_attention_heads", 16) * keys.get("attention_head_dim", 72)
    return {"cross_attention_dim": inner, "use_additional_conditions": False}


def _fault(keys: Keys, pretrained: bool) -> str | None:
    """Finds PixArt models that need resolutions and aspect ratios as inputs.

    The key `use_additional_conditions` decides this. If the key is None, a model with a side of 128 latents needs these inputs,
    as in diffusers' class.
    """
    said = keys.get("use_additional_conditions")
    if not pretrained and "use_additional_conditions" not in keys:
        return None
    if not (keys.get(SIZE, 128) == 128 if said is None else said):
        return None
    return (
        "use_additional_conditions: not supported: the model expects each image's resolution and aspect ratio. Use a model with "
        "use_additional_conditions: false"
    )


def _initial(backbone: Any) -> Weights:
    nothing = {block.attn2.to_out[0] for block in backbone.transformer_blocks} | {backbone.proj_out}
    yield from cross_attending(backbone, backbone.adaln_single, backbone.caption_projection, nothing)
    yield from patches(backbone.pos_embed.proj)


PIXART = Family(
    PixArtTransformer2DModel, "caption_channels", outputs=8, patch=2, masks=True, derived=_derived, fault=_fault, initial=_initial
)
