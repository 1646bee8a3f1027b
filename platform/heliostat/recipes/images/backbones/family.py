"""Describes a family of backbones: its class in diffusers, the keys that heliostat derives, and its initial weights.

A new backbone starts with the weights with which its authors start. If they published no training code, it keeps the weights of
diffusers' constructor. Every rank draws the numbers on the CPU, in the order of the modules. So every ZeRO stage and device
starts with the same weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from heliostat.recipes.partitioning import assign, shape

Keys = dict[str, Any]  # of a diffusers configuration
Weights = Iterator[tuple[torch.Tensor, torch.Tensor]]  # parameters, each with its initial value
SIZE = "sample_size"  # side of the noised tensor; heliostat knows this key for every family
EMBEDDING_STD = 0.02  # standard deviation in timestep and caption layers


@dataclass(frozen=True)
class Family:
    """Describes a family of backbones. Keys are those of the class in diffusers.

    - `width`, `pooled`: the keys of the widths of the text tokens and of the pooled text embedding.
    - `outputs`: the class's default of `out_channels`; None: as many as inputs.
    - `packed`: input channels of the class per channel of the noised tensor.
    - `masks`: whether the class can ignore padding of the text. `masked`: whether jobs do so by default.
    - `counts`: whether the class reads the lengths of captions from the mask, with the host.
    - `joins`: the text encoders that the family joins (`pipeline.join`): CLIP encoders; CLIP encoders and then another encoder;
      CLIP for the pooled embedding and another encoder for the tokens. Empty: only one text encoder.
    - `layer`: the layer of a single text encoder that gives the embeddings.
    - `derived`: the keys that follow from other keys of the job.
    - `fault`: the problem of a configuration that heliostat doesn't train; None without a problem. The second argument is
      whether the backbone is pretrained.
    - `initial`: the initial weights that differ from those of diffusers' constructor.
    """

    cls: Any
    width: str
    pooled: str | None = None
    outputs: int | None = None
    packed: int = 1
    part: str = "transformer"
    patch: int = 1  # the class's default of `patch_size`
    masks: bool = False
    masked: bool = False
    counts: bool = False
    joins: Literal["", "clips", "clips+text", "clip|text"] = ""
    layer: Literal["last", "penultimate"] = "last"
    derived: Callable[[Keys], Keys] = lambda keys: {}
    fault: Callable[[Keys, bool], str | None] = lambda keys, pretrained: None
    initial: Callable[[Any], Weights] = lambda backbone: iter(())

    @property
    def known(self) -> list[str]:
        """Returns the keys of the class, and `sample_size`."""
        own = list(inspect.signature(self.cls.__init__).parameters)[1:]
        return own if SIZE in own else [*own, SIZE]

    def widths(self, keys: Keys) -> tuple[str, ...]:
        """Returns the keys that must be the text's width."""
        if keys.get("encoder_hid_dim_type") == "text_proj":  # the U-Net projects the text to its own width
            return ("encoder_hid_dim",)
        return (self.width, self.pooled) if self.pooled else (self.width,)

    def own(self, keys: Keys) -> Keys:
        """Returns the keys that the class has."""
        parameters = inspect.signature(self.cls.__init__).parameters
        return {key: value for key, value in keys.items() if key in parameters}

    def channels(self, keys: Keys) -> int:
        """Returns the channels of the noised tensor; 4 if the keys don't have them."""
        return int(keys.get("in_channels", 4 * self.packed)) // self.packed

    def answers(self, keys: Keys) -> int | None:
        """Returns the channels of a prediction, from the backbone's own keys; None: as many as the noised tensor has."""
        said = keys.get("out_channels", self.outputs)
        return None if said is None else int(said) // self.packed

    def step(self, keys: Keys) -> int:
        """Returns the number that must divide the sides of the noised tensor."""
        return int(keys.get("patch_size") or self.patch) if self.packed == 1 else 2

    def initialize(self, backbone: Any) -> None:
        """Initializes the weights of a new backbone. Does nothing if the backbone is on the meta device."""
        if next(backbone.parameters()).is_meta:
            return
        with torch.no_grad():
            for parameter, value in self.initial(backbone):
                assign(parameter, value)


def blank(parameter: torch.Tensor) -> torch.Tensor:
    """Returns an empty tensor of a parameter's complete shape, on the CPU."""
    return torch.empty(shape(parameter), device="cpu")


def zero(layer: Any) -> Weights:
    """Yields zeros for a layer's weight and bias."""
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            yield parameter, torch.zeros(shape(parameter), device="cpu")


def linear(layer: nn.Linear, outputs: int | None = None, std: float | None = None) -> Weights:
    """Yields initial values for a linear layer: a zero bias, and a weight of normal (`std`) or Xavier-uniform numbers. `outputs`:
    the number of outputs of the original layer, if several layers here form one original layer."""
    draw = blank(layer.weight)
    yield layer.weight, draw.normal_(std=std) if std else xavier(draw, outputs)
    if layer.bias is not None:
        yield layer.bias, torch.zeros(shape(layer.bias), device="cpu")


def cross_attending(backbone: Any, time: Any, caption: Any, nothing: Container[nn.Module] = ()) -> Weights:
    """Yields the initial weights of the linear layers of a transformer with cross-attention. `time`, `caption`: layers of the
    timestep and the captions. `nothing`: layers that begin as zero."""
    embedder = time.emb.timestep_embedder
    small = {embedder.linear_1, embedder.linear_2, time.linear, caption.linear_1, caption.linear_2}
    fused = dict[nn.Module, int]()  # number of diffusers' matrices that form one original matrix
    for block in backbone.transformer_blocks:
        fused |= {block.attn1.to_q: 3, block.attn1.to_k: 3, block.attn1.to_v: 3, block.attn2.to_k: 2, block.attn2.to_v: 2}
    for module in backbone.modules():
        if module in nothing:
            yield from zero(module)
        elif isinstance(module, nn.Linear):
            outputs = fused.get(module, 1) * shape(module.weight)[0]
            yield from linear(module, outputs, EMBEDDING_STD if module in small else None)


def patches(convolution: Any) -> Weights:
    """Yields the weight of a convolution that embeds patches, initialized like a linear layer on the pixels of a patch."""
    weight = convolution.weight
    flat = torch.empty((shape(weight)[0], math.prod(shape(weight)[1:])), device="cpu")
    yield weight, xavier(flat).view(shape(weight))


def xavier(matrix: torch.Tensor, outputs: int | None = None) -> torch.Tensor:
    """Fills a matrix with Xavier-uniform numbers, whose bound depends on the sum of inputs and outputs."""
    bound = math.sqrt(6 / (matrix.shape[1] + (outputs or matrix.shape[0])))
    return matrix.uniform_(-bound, bound)
