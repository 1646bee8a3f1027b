"""Divides the experts of each layer over the workers of a group (`train.parallel.expert`), at ZeRO stage 3.

Ranks [0, n) are the first group, [n, 2n) the second, ... Experts of a layer are stacked, so a worker that holds some of them
whole holds one slice of the flat tensor; ZeRO divides that slice among the workers which hold the same, one of each group. So
what a worker has of a parameter is a slice of the flat whole in every layout, and checkpoints load at any other.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist

from heliostat.engine import patches
from heliostat.errors import ConfigError
from heliostat.parallel.division import Division
from heliostat.recipes.protocol import DividesExperts, Recipe


def divide(recipe: Recipe, model: torch.nn.Module, workers: int) -> None:
    """Leaves this worker its own experts of a model that was built at stage 3, and makes the model send tokens to those of
    others; collective."""
    if workers == 1:
        return
    assert isinstance(recipe, DividesExperts)
    name = f"ep_size_{workers}"
    group, same_experts = patches.expert_groups(name, workers)
    division = Division(dist.get_rank(group), workers, group)
    for module in recipe.stacked_experts(model):
        parameters: dict[str, Any] = dict(module.named_parameters(recurse=False))
        for key, whole in parameters.items():
            if whole.ds_shape[0] % workers:
                raise ConfigError(f"train.parallel.expert: {workers} does not divide the {whole.ds_shape[0]} experts of a layer")
            own = _part(whole, division)
            patches.place_expert(own, name, same_experts)
            setattr(module, key, own)
            whole.convert_to_zero_parameters(param_list=[own])
    gc.collect()  # ZeRO's parameters are in circles, and this worker's part of the undivided ones would stay
    recipe.exchange_tokens(model, group)


def _part(whole: Any, division: Division) -> Any:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([whole]):
        each = whole.ds_shape[0] // division.parts
        values = whole.data[division.part * each : (division.part + 1) * each].clone()
    own: Any = torch.nn.Parameter(values, requires_grad=whole.requires_grad)
    own.division, own.whole_shape = division, tuple(whole.ds_shape)
    return own
