"""Builds a recipe's model for training, freezes submodules, and makes the optimizer's parameter groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from heliostat.errors import ConfigError
from heliostat.recipes.partitioning import shape as shape
from heliostat.recipes.protocol import GUIDE, Group, Recipe


def build(recipe: Recipe) -> torch.nn.Module:
    """Builds the recipe's model on the default device, and freezes the submodules in `recipe.frozen`. Raises ConfigError if one
    of these submodules doesn't exist."""
    model = recipe.build()
    for module in frozen_modules(recipe, model):
        module.requires_grad_(False)
    rest(recipe, model)
    return model


def frozen_modules(recipe: Recipe, model: torch.nn.Module) -> list[torch.nn.Module]:
    known = dict(model.named_modules())
    for name in recipe.frozen:
        if name not in known:
            raise ConfigError(
                f"recipe: {type(recipe).__name__}.frozen names {name!r}, but the model has no such submodule. "
                f"Correct `frozen` ({GUIDE})"
            )
    return [known[name] for name in recipe.frozen]


def rest(recipe: Recipe, model: torch.nn.Module) -> None:
    """Puts frozen submodules back into evaluation mode after a call of `train()`.

    In evaluation mode, these submodules use no dropout, and don't update running statistics.
    """
    for module in frozen_modules(recipe, model):
        module.eval()


def sparse_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Lists the modules that have a list of expert modules (`experts`). Each token uses only a few of these experts."""
    return [m for m in model.modules() if isinstance(getattr(m, "experts", None), torch.nn.ModuleList)]


def gathered_whole(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Lists the modules that compute directly with their submodules' parameters. ZeRO-3 gathers all parameters of such a module
    together."""
    return [m for m in model.modules() if getattr(m, "gathered_whole", False)]


def put_buffer(model: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    """Replaces a buffer of the model with a new tensor."""
    owner, _, own = name.rpartition(".")
    model.get_submodule(owner)._buffers[own] = values


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, recipe: Recipe, orthogonalizes: bool = False
) -> list[dict[str, Any]]:
    """Makes the optimizer's parameter groups from the recipe's groups. Each parameter group has a `weight_decay` and an
    `lr_scale`.

    Groups with the job's weight decay come first. Apart from this, groups are in the model's order. If the optimizer
    `orthogonalizes`, hidden matrices are in separate groups, in which `orthogonal` is true.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = hidden_matrices(recipe, model) if orthogonalizes else frozenset[str]()
    return [
        {
            "params": [trained[name] for name in names],
            "weight_decay": weight_decay if group.weight_decay is None else group.weight_decay,
            "lr_scale": group.lr,
            **({"orthogonal": names[0] in hidden} if orthogonalizes else {}),
        }
        for group, names in grouped(recipe, {name: shape(p) for name, p in trained.items()}, hidden)
    ]


def hidden_matrices(recipe: Recipe, model: torch.nn.Module) -> frozenset[str]:
    """Lists the names of the trained matrices between hidden layers: 2-D parameters, and the stacked matrices of experts.
    Embeddings, output heads, and convolutions aren't included, unless the recipe sets `hidden` for them.

    A recipe can override this choice with `Group.hidden`. Raises ConfigError if the recipe sets `hidden` for a parameter that
    isn't a matrix.
    """
    apart = {id(p) for m in _apart(model) for p in m.parameters(recurse=False)}
    names = set()
    for name, p in model.named_parameters():
        if p.requires_grad:
            dimensions, said = len(shape(p)), recipe.group(name, shape(p)).hidden
            if said and dimensions not in (2, 3, 4):
                raise ConfigError(
                    f"recipe: {type(recipe).__name__}.group sets `hidden` for {name!r}, but this parameter isn't a matrix. "
                    f"Return a Group without `hidden` for {name!r} ({GUIDE})"
                )
            looks = id(p) not in apart and (dimensions == 2 or (dimensions == 3 and "experts" in name.split(".")))
            if looks if said is None else said:
                names.add(name)
    return frozenset(names)


def _apart(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yields the modules whose matrices aren't between hidden layers: embeddings, convolutions, and the output head."""
    yield from (m for m in model.modules() if isinstance(m, torch.nn.Embedding | torch.nn.modules.conv._ConvNd))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        yield head


def grouped(
    recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], hidden: frozenset[str] = frozenset()
) -> list[tuple[Group, list[str]]]:
    """Groups the names of trained parameters by the result of the recipe's `group`, and keeps their order. Parameters in `hidden`
    are in separate groups. Raises ConfigError if a weight decay or learning rate is negative or not finite."""
    groups: dict[tuple[Group, bool], list[str]] = {}
    for name, size in shapes.items():
        groups.setdefault((recipe.group(name, size), name in hidden), []).append(name)
    for group, _ in groups:
        for what, value in (("weight_decay", group.weight_decay), ("lr", group.lr)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"recipe: {type(recipe).__name__}.group returns {what} {value!r}. Return a finite number of at least 0"
                )
    return sorted(((group, names) for (group, _), names in groups.items()), key=lambda item: item[0].weight_decay is not None)
