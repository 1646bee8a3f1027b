"""Stores the linear layers of a frozen base in 4 bits: NF4 (Dettmers et al. 2023, arXiv 2305.14314), for adapters
(`recipes.adapters`).

Each block of 64 weights is divided by its largest absolute value, and rounded to one of 16 values. A weight then needs 4.5 bits
instead of 16. The codes, their order, and the scales are those of `bitsandbytes` on a CPU without double quantization, bit for
bit. heliostat computes them with torch, on every device. Layers that this can't store (`reason_kept`) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

from heliostat.recipes import weightless
from heliostat.recipes.constants import Constant

BLOCK = 64  # weights that share a scale
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
PACKED, SCALES = "packed", "scales"  # names of the parameters
BITS = 4
PAIRS = Constant(
    torch.from_numpy(np.array([(high, low) for high in LEVELS for low in LEVELS], np.float32))
)  # values of each byte


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """Returns the values of a tensor in blocks, fp32 [blocks, BLOCK]. Zeros fill the last block."""
    flat = weight.detach().reshape(-1).float()
    missing = -flat.numel() % BLOCK
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def scales(weight: torch.Tensor) -> torch.Tensor:
    """Computes the scale of each block: the bytes of fp32 numbers, uint8 [4 * blocks]. As bytes, a cast of the model doesn't
    change them."""
    return _blocks(weight).abs().amax(1).view(torch.uint8)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Computes the codes of a weight [out, in], two per byte: uint8 [out, in / 2]."""
    blocks = _blocks(weight)
    levels = torch.tensor(LEVELS, device=blocks.device)
    scaled = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    pairs = codes.view(-1)[: weight.numel()].view(-1, 2)
    return ((pairs[:, 0] << BITS) | pairs[:, 1]).view(weight.shape[0], -1)


def unpack(packed: torch.Tensor, scale_bytes: torch.Tensor) -> torch.Tensor:
    """Computes the weight that `packed` [out, in / 2] and `scale_bytes` [4 * blocks] represent, fp32 [out, in]. Only the first
    call waits for the device."""
    values = F.embedding(packed.reshape(-1).int(), PAIRS.on(packed.device))
    scaled = _blocks(values) * scale_bytes.view(torch.float32).unsqueeze(1)
    return scaled.view(-1)[: values.numel()].view(packed.shape[0], -1)


def restored(packed: torch.Tensor, scale_bytes: torch.Tensor) -> torch.Tensor:
    """Computes the same as `unpack` from bytes that are stored as fp32 numbers, as exports read them."""
    return unpack(packed.to(torch.uint8), scale_bytes.to(torch.uint8).reshape(-1))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Rounds a weight [out, in] to the values that 4 bits represent, fp32."""
    return unpack(pack(weight), scales(weight))


class _Multiply(torch.autograd.Function):
    """Multiplies inputs with a 4-bit weight. Keeps only the 4-bit weight for the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: torch.Tensor, packed: torch.Tensor, scale_bytes: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scale_bytes)
        return F.linear(inputs, unpack(packed, scale_bytes).to(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = gradients
        return gradient @ unpack(*ctx.saved_tensors).to(gradient.dtype), None, None, None


class Nf4Linear(torch.nn.Linear):
    """Computes like a linear layer whose weight is rounded to 4 bits. The weight isn't trained. Casts of the model change the
    type of `weight`, as that of any layer."""

    packed: torch.nn.Parameter
    scales: torch.nn.Parameter

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        weight, self.in_features, self.out_features = layer.weight, layer.in_features, layer.out_features
        blocks = -(-self.in_features * self.out_features // BLOCK)
        shapes = {PACKED: (self.out_features, self.in_features // 2), SCALES: (4 * blocks,)}
        for name, make in ((PACKED, pack), (SCALES, scales)):
            empty = torch.empty(shapes[name], dtype=torch.uint8, device=weight.device)
            self.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
            weightless.starts_as(getattr(self, name), make, weight)
        self.register_parameter("bias", layer.bias)
        self._typed = torch.empty(0, dtype=weight.dtype, device="cpu")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Nf4Linear:
        self._typed = fn(self._typed)
        return super()._apply(fn, recurse)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Returns the weight that the layer multiplies with, [out, in], in the model's type."""
        return unpack(self.packed, self.scales).to(self._typed.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Multiply.apply(inputs, self.packed, self.scales, self.bias)
        return product


def layers_of(model: torch.nn.Module) -> dict[str, Nf4Linear]:
    """Lists a model's layers in 4 bits, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Nf4Linear)}


def count(model: torch.nn.Module) -> int:
    """Counts a model's weights. A weight in 4 bits counts like any other weight, and scales don't count."""
    packed = sum(layer.in_features * layer.out_features for layer in layers_of(model).values())
    return packed + sum(p.numel() for p in model.parameters() if p.is_floating_point())


def reason_kept(layer: torch.nn.Linear) -> str | None:
    """Explains why a linear layer can't be in 4 bits; None if it can."""
    if type(layer) is not torch.nn.Linear:
        return f"of class {type(layer).__name__}"
    return f"an odd number of inputs, {layer.in_features}" if layer.in_features % 2 else None


def _rounds(model: torch.nn.Module, layers: list[str]) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yields the linear layers that can be in 4 bits, with their names."""
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        if reason_kept(layer) is None:
            yield name, layer


def replace(model: torch.nn.Module, layers: list[str]) -> None:
    """Stores the weights of these linear layers in 4 bits, except those with a `reason_kept`."""
    for name, layer in _rounds(model, layers):
        model.set_submodule(name, Nf4Linear(layer))


@torch.no_grad()
def round_all(model: torch.nn.Module, layers: list[str]) -> None:
    """Rounds the weights of the linear layers that `replace` stores in 4 bits, and keeps them in their precision."""
    for _, layer in _rounds(model, layers):
        layer.weight.copy_(rounded(layer.weight))
