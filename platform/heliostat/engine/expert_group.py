"""Shards the experts of each layer over the workers of a group (`train.parallel.expert`), at ZeRO stage 3.

Ranks [0, n) are the first group, [n, 2n) the second, and so on. One tensor stacks all experts of a layer, so a worker with some
complete experts has one slice of the flattened tensor. ZeRO shards this slice over the workers that have the same experts: one
worker of each group.

So in every parallelism configuration, a worker's part of a parameter is a slice of the flattened parameter. Checkpoints therefore
load in any other configuration.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist

from heliostat.engine import patches
from heliostat.errors import ConfigError
from heliostat.parallel import division
from heliostat.parallel.division import Division
from heliostat.recipes.protocol import DividesExperts, Recipe


def divide(recipe: Recipe, model: torch.nn.Module, workers: int) -> None:
    """Keeps only this worker's experts of a model that was built at stage 3. Makes the model send tokens to the experts of other
    workers. Collective. Raises ConfigError if `workers` doesn't divide the number of experts."""
    if workers == 1:
        return
    assert isinstance(recipe, DividesExperts)
    name = f"ep_size_{workers}"
    group, same_experts = patches.expert_groups(name, workers)
    mine = Division(dist.get_rank(group), workers, group)
    for module in recipe.stacked_experts(model):
        for key, whole in list(module.named_parameters(recurse=False)):
            if (experts := division.shape(whole)[0]) % workers:
                raise ConfigError(
                    f"train.parallel.expert: {workers} doesn't divide the {experts} experts of a layer. "
                    f"Use a divisor of {experts}"
                )
            own = _part(whole, mine)
            patches.place_expert(own, whole, name, same_experts)
            setattr(module, key, own)
    gc.collect()  # ZeRO's parameters are in reference cycles, and would keep the memory of all experts
    recipe.exchange_tokens(model, group)


def _part(whole: torch.nn.Parameter, mine: Division) -> torch.nn.Parameter:
    from deepspeed import zero

    with zero.GatheredParameters([whole]):
        own = torch.nn.Parameter(mine.cut(whole.data), requires_grad=whole.requires_grad)
    division.note(own, division.shape(whole), mine)
    return own
