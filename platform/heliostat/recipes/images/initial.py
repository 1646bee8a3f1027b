"""Initializes the weights of a backbone as its authors did. diffusers keeps torch's default initialization.

- U-Net: the last layer of every residual branch is zero, so that the branch begins as the identity. The last layer of the network
  is zero too, so that the network outputs zeros. (Ho et al. 2020: `init_scale=0.` in hojonathanho/diffusion; Dhariwal and Nichol
  2021, arXiv 2105.05233: `zero_module` in openai/guided-diffusion; latent diffusion also uses it, Rombach et al. 2022, arXiv
  2112.10752.)
- PixArt: `initialize_weights` of PixArt-alpha/PixArt-alpha (Chen et al. 2023, arXiv 2310.00426). It is DiT's initialization
  (Peebles and Xie 2022, arXiv 2212.09748), and in addition, the output of cross-attention begins as zero.
- SD3: the authors have published no initialization, so SD3 keeps diffusers' weights.

Every rank draws the numbers on the CPU, in the order of the modules. So every ZeRO stage and device starts with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from heliostat.recipes.partitioning import assign, shape

EMBEDDING_STD = 0.02  # standard deviation in PixArt's timestep and caption layers


def initialise(arch: str, backbone: Any) -> None:
    """Initializes the weights of a new backbone. Does nothing if the backbone is on the meta device."""
    if next(backbone.parameters()).is_meta or arch == "sd3":
        return
    with torch.no_grad():
        for parameter, value in _unet(backbone) if arch == "unet" else _pixart(backbone):
            assign(parameter, value)


def _zero(layer: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            yield parameter, torch.zeros(shape(parameter), device="cpu")


def _unet(backbone: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    for module in backbone.modules():
        if isinstance(module, ResnetBlock2D):
            yield from _zero(module.conv2)
        elif isinstance(module, Transformer2DModel):
            yield from _zero(module.proj_out)
        elif isinstance(module, Attention) and module.residual_connection:  # not inside a Transformer2DModel
            yield from _zero(module.to_out[0])
    yield from _zero(backbone.conv_out)


def _pixart(backbone: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    time, caption = backbone.adaln_single, backbone.caption_projection
    embedder = time.emb.timestep_embedder
    small = {embedder.linear_1, embedder.linear_2, time.linear, caption.linear_1, caption.linear_2}
    nothing = {block.attn2.to_out[0] for block in backbone.transformer_blocks} | {backbone.proj_out}
    fused = dict[nn.Module, int]()  # number of diffusers' matrices that form one original matrix
    for block in backbone.transformer_blocks:
        fused |= {block.attn1.to_q: 3, block.attn1.to_k: 3, block.attn1.to_v: 3, block.attn2.to_k: 2, block.attn2.to_v: 2}
    for module in backbone.modules():
        if module in nothing:
            yield from _zero(module)
        elif isinstance(module, nn.Linear):
            draw = torch.empty(shape(module.weight), device="cpu")
            yield module.weight, draw.normal_(std=EMBEDDING_STD) if module in small else _xavier(draw, fused.get(module, 1))
            if module.bias is not None:
                yield module.bias, torch.zeros(shape(module.bias), device="cpu")
    patches = backbone.pos_embed.proj.weight
    flat = torch.empty((shape(patches)[0], math.prod(shape(patches)[1:])), device="cpu")
    yield patches, _xavier(flat, 1).view(shape(patches))


def _xavier(matrix: torch.Tensor, parts: int) -> torch.Tensor:
    """Fills a matrix with Xavier-uniform numbers. The bound of these numbers depends on the sum of inputs and outputs. `parts`:
    the number of matrices here that form one matrix in the original code; the sum counts the outputs of all these matrices."""
    bound = math.sqrt(6 / (matrix.shape[1] + parts * matrix.shape[0]))
    return matrix.uniform_(-bound, bound)
