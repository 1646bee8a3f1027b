"""Describes U-Nets with cross-attention to the text, such as Stable Diffusion 1 and 2.

Initial weights: the last layer of every residual branch is zero, so that the branch begins as the identity. The last layer of the
network is zero too, so that the network outputs zeros. (Ho et al. 2020: `init_scale=0.` in hojonathanho/diffusion; Dhariwal and
Nichol 2021, arXiv 2105.05233: `zero_module` in openai/guided-diffusion; latent diffusion also uses it, Rombach et al. 2022, arXiv
2112.10752.)
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from heliostat.recipes.images.backbones.family import Family, Weights, zero


def initial(backbone: Any) -> Weights:
    for module in backbone.modules():
        if isinstance(module, ResnetBlock2D):
            yield from zero(module.conv2)
        elif isinstance(module, Transformer2DModel):
            yield from zero(module.proj_out)
        elif isinstance(module, Attention) and module.residual_connection:  # not inside a Transformer2DModel
            yield from zero(module.to_out[0])
    yield from zero(backbone.conv_out)


UNET = Family(UNet2DConditionModel, "cross_attention_dim", outputs=4, part="unet", masks=True, joins="clips", initial=initial)
