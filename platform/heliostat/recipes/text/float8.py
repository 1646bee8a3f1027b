"""Multiplies the linear layers of a language model in float8: `train.fp8` (Micikevicius et al. 2022, arXiv 2209.05433).

Each matrix multiplication scales each input tensor by the tensor's largest number, and rounds the result. Gradients are rounded
to E5M2, and all other tensors to E4M3. Weights keep their precision, so optimizers, checkpoints, and exports are unaffected. The
backward pass needs the rounded input, which takes half the memory of bf16. The backward pass also needs the weight, which ZeRO-3
may release between the passes.

A CPU uses the same rounded numbers, but multiplies these numbers in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

from heliostat.errors import ConfigError
from heliostat.parallel.language_model import LanguageModel
from heliostat.recipes.text import checkpointing

KEY = "train.fp8"
CAPABILITY = (8, 9)  # lowest compute capability with float8 (Ada); later GPUs have it too
MULTIPLE = 16  # GPUs need matrices whose sides are multiples of this
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 1e-12  # lower limit of a tensor's largest number, so that a tensor of zeros has a scale

Scaled = tuple[torch.Tensor, torch.Tensor]  # rounded numbers, and the factor that restores their scale


class Float8Linear(torch.nn.Linear):
    """Computes a linear layer in float8."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, self.in_features)
        spare = -len(rows) % MULTIPLE
        product: torch.Tensor = Float8Product.apply(F.pad(rows, (0, 0, 0, spare)) if spare else rows, self.weight)
        product = product[: len(rows)].reshape(*input.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


class Float8Product(torch.autograd.Function):
    """Multiplies rows [rows, in] by a weight [out, in] in float8."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        low, scale = rounded(rows, FORWARD)
        ctx.save_for_backward(low, scale, weight)
        return multiplied((low, scale), rounded(weight, FORWARD), rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,) = gradients
        low, scale, weight = ctx.saved_tensors
        back, across = rounded(gradient, BACKWARD), rounded(weight, FORWARD)
        of_rows = multiplied(back, _turned(across), gradient.dtype)
        of_weight = multiplied(_turned(back), _turned((low, scale)), gradient.dtype)
        return of_rows, of_weight


def rounded(values: torch.Tensor, kind: torch.dtype) -> Scaled:
    """Scales a tensor so that the tensor's largest number becomes the largest float8 number, and rounds the result to float8.
    Returns the result and the scale."""
    scale = values.detach().abs().amax().float().clamp(min=SMALLEST) / torch.finfo(kind).max
    return (values.float() / scale).to(kind), scale


def multiplied(a: Scaled, b: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """Multiplies a [rows, inner] by b [columns, inner]. Both have the memory layout that GPUs need."""
    if a[0].is_cuda:
        return torch._scaled_mm(a[0], b[0].t(), a[1], b[1], out_dtype=dtype)
    return ((a[0].float() * a[1]) @ (b[0].float() * b[1]).t()).to(dtype)


def _turned(scaled: Scaled) -> Scaled:
    return scaled[0].t().contiguous(), scaled[1]


def use(model: torch.nn.Module) -> None:
    """Makes the linear layers inside a model's layers multiply in float8. The parameters stay the same."""
    require_device()
    for m in linears(model):
        m.__class__ = Float8Linear


def linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Lists the linear layers that support float8: those inside the model's layers, with sides that are multiples of MULTIPLE."""
    return [
        m
        for layer in checkpointing.layers(model)
        for m in layer.modules()
        if type(m) is torch.nn.Linear and not (m.in_features % MULTIPLE or m.out_features % MULTIPLE)
    ]


def require(recipe: LanguageModel) -> None:
    """Raises ConfigError unless the model has supported linear layers."""
    kind = recipe.config.model_type
    if recipe.routes:
        raise ConfigError(
            f"{KEY}: not supported for {kind!r}: its experts aren't linear layers, and its routers need full "
            "precision. Set this key to false"
        )
    with torch.device("meta"):
        model = recipe.plainly().build()
    if not linears(model):
        raise ConfigError(
            f"{KEY}: not supported: no layer of {kind!r} has an nn.Linear with sides that are multiples of "
            f"{MULTIPLE}. Set this key to false"
        )


def require_device() -> None:
    """Raises ConfigError if this process's GPU doesn't support float8."""
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < CAPABILITY:
        needs, has = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        name = torch.cuda.get_device_name()
        raise ConfigError(
            f"{KEY}: needs GPUs of compute capability {needs} or later, but {name} has {has}. Set this key to false"
        )
