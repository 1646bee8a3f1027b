"""Builds a recipe's model as the engine trains it, with its frozen submodules excluded from training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from heliostat.errors import ConfigError
from heliostat.recipes.protocol import GUIDE, Group, Recipe


def build(recipe: Recipe) -> torch.nn.Module:
    """Builds the recipe's model on the default device, its `frozen` submodules frozen; ConfigError if one does not exist."""
    model = recipe.build()
    for module in frozen_modules(recipe, model):
        module.requires_grad_(False)
    rest(recipe, model)
    return model


def frozen_modules(recipe: Recipe, model: torch.nn.Module) -> list[torch.nn.Module]:
    known = dict(model.named_modules())
    for name in recipe.frozen:
        if name not in known:
            raise ConfigError(f"recipe: {type(recipe).__name__}.frozen names {name!r}, no submodule of its model ({GUIDE})")
    return [known[name] for name in recipe.frozen]


def rest(recipe: Recipe, model: torch.nn.Module) -> None:
    """Puts frozen submodules into evaluation mode, which `train()` takes them out of: no dropout, no running statistics."""
    for module in frozen_modules(recipe, model):
        module.eval()


def parameter_groups(model: torch.nn.Module, weight_decay: float, recipe: Recipe) -> list[dict[str, Any]]:
    """Makes the optimizer's parameter groups from the recipe's, with `weight_decay` and `lr_scale`: those with the job's weight
    decay first, then in the model's order. ZeRO-3 flattens parameters and keeps the true shape in `ds_shape`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = grouped(recipe, {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()})
    return [
        {
            "params": [trained[name] for name in names],
            "weight_decay": weight_decay if group.weight_decay is None else group.weight_decay,
            "lr_scale": group.lr,
        }
        for group, names in found
    ]


def grouped(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[Group, list[str]]]:
    """Groups the names of trained parameters by the recipe's `group` for their shapes, in order; ConfigError for a weight decay
    or a learning rate that is negative or not finite."""
    found: dict[Group, list[str]] = {}
    for name, shape in shapes.items():
        found.setdefault(recipe.group(name, shape), []).append(name)
    for group in found:
        for what, value in (("weight_decay", group.weight_decay), ("lr", group.lr)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"recipe: {type(recipe).__name__}.group gives {what} {value!r}, which must be at least 0")
    return sorted(found.items(), key=lambda item: item[0].weight_decay is not None)
