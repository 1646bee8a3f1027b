"""Computes the tensors of exported adapters (`recipes.adapters`): of the adapter's file, and of the model with the adapter merged
into its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from heliostat.recipes.adapters import BASE, DOWN, MAGNITUDE, SHORT, UP, Adapter
from heliostat.recipes.protocol import Weight

if TYPE_CHECKING:  # jobs are checked without torch
    import torch


def exported(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], str]) -> dict[str, Weight]:
    """Returns the tensors of an adapter's file. `rename`: maps a layer's name in the model to its prefix in the file."""
    tensors = {}
    for name, shape in shapes.items():
        for own, short in SHORT.items():
            if name.endswith(f".{own}"):
                tensors[f"{rename(name.removesuffix(f'.{own}'))}.{short}"] = Weight((name,), shape)
    return tensors


def layers_of(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Lists the layers with an adapter, from the names of a model's parameters."""
    return [name.removesuffix(f".{DOWN}") for name in shapes if name.endswith(f".{DOWN}")]


def merged(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
    """Returns the tensors of a model without adapters that computes the same: W + scale B A in place of each W, and for `dora`
    each row scaled to its trained norm. A weight in 4 bits becomes the numbers that it represents."""
    tensors = {}
    for name, weight in _base_weights(adapter, shapes).items():
        layer, inside, own = name.rpartition(f".{BASE}.")
        if inside and own == "weight":
            parts = [DOWN, UP, MAGNITUDE][: 3 if adapter.method == "dora" else 2]
            make = partial(merge_restored if weight.make else merge, adapter.scale)
            weight = Weight((*weight.sources, *(f"{layer}.{part}" for part in parts)), weight.shape, make)
        tensors[f"{layer}.{own}" if inside else name] = weight
    return tensors


def _base_weights(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
    """Returns the tensors of the base by their names in the model, without the matrices of the adapter."""
    from heliostat.recipes import quantized

    tensors = {}
    for name, shape in shapes.items():
        owner, _, own = name.rpartition(".")
        if adapter.base and own == quantized.PACKED:
            sources = (name, f"{owner}.{quantized.SCALES}")
            tensors[f"{owner}.weight"] = Weight(sources, (shape[0], 2 * shape[1]), quantized.restored)
        elif not (adapter.base and own == quantized.SCALES) and not any(name.endswith(f".{each}") for each in SHORT):
            tensors[name] = Weight((name,), shape)
    return tensors


def merge(
    scale: float, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, magnitude: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes the weight of a layer with its adapter, fp32 [out, in]."""
    changed = weight + scale * (up @ down)
    return changed if magnitude is None else changed * (magnitude / changed.norm(dim=1)).unsqueeze(1)


def merge_restored(
    scale: float, packed: torch.Tensor, scale_bytes: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """Computes the weight of a layer with its adapter, fp32 [out, in], from a weight in 4 bits."""
    from heliostat.recipes import quantized

    return merge(scale, quantized.restored(packed, scale_bytes), down, up)
