"""Describes Lumina-Image 2.0: a transformer on one sequence of text and image (Qin et al. 2025, arXiv 2503.21758).

Initial weights: as in `models/model.py` of Alpha-VLLM/Lumina-Image-2.0 and Alpha-VLLM/Lumina-T2X: Xavier-uniform in all matrices,
zero in the modulations and in the last layer, a standard deviation of 0.02 in the layers of the timestep and the captions.
"""

from __future__ import annotations

from typing import Any

from diffusers import Lumina2Transformer2DModel
from torch import nn

from heliostat.recipes.images.backbones.family import EMBEDDING_STD, Family, Keys, Weights, linear, zero
from heliostat.recipes.partitioning import shape


def _fault(keys: Keys, pretrained: bool) -> str | None:
    head = keys.get("hidden_size", 2304) // keys.get("num_attention_heads", 24)
    axes = keys.get("axes_dim_rope", (32, 32, 32))
    if sum(axes) != head or any(axis % 2 for axis in axes):
        return f"axes_dim_rope: {list(axes)} aren't even numbers with the sum {head} (hidden_size / num_attention_heads). Set it"
    return None


def _initial(backbone: Any) -> Weights:
    embedder = backbone.time_caption_embed.timestep_embedder
    small = {embedder.linear_1, embedder.linear_2, backbone.time_caption_embed.caption_embedder[1]}
    blocks = [*backbone.noise_refiner, *backbone.context_refiner, *backbone.layers]
    nothing = {block.norm1.linear for block in blocks if block.modulation}
    nothing |= {backbone.norm_out.linear_1, backbone.norm_out.linear_2}
    fused = dict[nn.Module, int]()  # outputs of the original matrix, which is three of diffusers' matrices
    for block in blocks:
        three = (block.attn.to_q, block.attn.to_k, block.attn.to_v)
        fused |= dict.fromkeys(three, sum(shape(m.weight)[0] for m in three))
    for module in backbone.modules():
        if module in nothing:
            yield from zero(module)
        elif isinstance(module, nn.Linear):
            yield from linear(module, fused.get(module), EMBEDDING_STD if module in small else None)


LUMINA = Family(
    Lumina2Transformer2DModel, "cap_feat_dim", patch=2, masks=True, masked=True, counts=True, layer="penultimate",
    fault=_fault, initial=_initial,
)  # fmt: skip
