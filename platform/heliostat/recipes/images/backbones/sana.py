"""Describes Sana: a transformer with linear attention and convolutions, for latents of a deep autoencoder (Xie et al. 2024, arXiv
2410.10629).

Initial weights: `initialize` of `SanaMS` in NVlabs/Sana: Xavier-uniform in linear layers and in the layer that embeds patches, a
standard deviation of 0.02 in the layers of the timestep and the captions. The 1 x 1 convolutions keep torch's weights.
"""

from __future__ import annotations

from typing import Any

from diffusers import SanaTransformer2DModel
from torch import nn

from heliostat.recipes.images.backbones.family import EMBEDDING_STD, Family, Keys, Weights, linear, patches
from heliostat.recipes.partitioning import shape


def _derived(keys: Keys) -> Keys:
    return {"cross_attention_dim": keys.get("num_attention_heads", 70) * keys.get("attention_head_dim", 32)}


def _fault(keys: Keys, pretrained: bool) -> str | None:
    if keys.get("guidance_embeds"):
        return "guidance_embeds: not supported: only distillation trains these embeddings. Use a model without them"
    return None


def _initial(backbone: Any) -> Weights:
    time, caption = backbone.time_embed, backbone.caption_projection
    embedder = time.emb.timestep_embedder
    small = {embedder.linear_1, embedder.linear_2, time.linear, caption.linear_1, caption.linear_2}
    fused = dict[nn.Module, int]()  # number of diffusers' matrices that form one original matrix
    for block in backbone.transformer_blocks:
        fused |= {block.attn1.to_q: 3, block.attn1.to_k: 3, block.attn1.to_v: 3, block.attn2.to_k: 2, block.attn2.to_v: 2}
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            outputs = fused.get(module, 1) * shape(module.weight)[0]
            yield from linear(module, outputs, EMBEDDING_STD if module in small else None)
    yield from patches(backbone.patch_embed.proj)


SANA = Family(
    SanaTransformer2DModel, "caption_channels", outputs=32, masks=True, masked=True,
    derived=_derived, fault=_fault, initial=_initial,
)  # fmt: skip
