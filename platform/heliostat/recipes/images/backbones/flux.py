"""Describes FLUX.1: blocks with two streams as in SD3, then with one stream, with rotary positions (Black Forest Labs 2024).

The class gets squares of 2 x 2 latents as tokens, so its `in_channels` are four times the latents' channels. Initial weights:
the authors published no training code, so FLUX keeps the weights of diffusers' constructor.
"""

from __future__ import annotations

from diffusers import FluxTransformer2DModel

from heliostat.recipes.images.backbones.family import Family, Keys


def _fault(keys: Keys, pretrained: bool) -> str | None:
    if keys.get("guidance_embeds") and not pretrained:
        return (
            "guidance_embeds: needs a pretrained backbone, because distillation trains these embeddings. "
            "Remove this key, or use a pretrained backbone"
        )
    head, axes = keys.get("attention_head_dim", 128), keys.get("axes_dims_rope", (16, 56, 56))
    if sum(axes) != head or any(axis % 2 for axis in axes):
        return f"axes_dims_rope: {list(axes)} aren't even numbers with the sum {head} (attention_head_dim). Set this key"
    return None


FLUX = Family(FluxTransformer2DModel, "joint_attention_dim", "pooled_projection_dim", packed=4, joins="clip|text", fault=_fault)
