"""Tests, before a run begins, whether a language model supports all settings of the job. If a setting isn't supported, a
ConfigError names the key.

Importing torch takes seconds, and most jobs need no torch for these tests. So each test imports only the modules that it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from heliostat.errors import ConfigError
from heliostat.recipes import adapters
from heliostat.recipes.adapters import Adapter
from heliostat.recipes.text import expert_keys, initial
from heliostat.recipes.text.expert_keys import MixtureModel

if TYPE_CHECKING:
    import torch


class ProbedModel(MixtureModel, Protocol):
    """Lists the additional attributes of a language model's recipe that tests read (`causal_lm.CausalLM`)."""

    pretrained: str | None
    adapter: Adapter | None
    balances: bool
    unbalanced: bool
    fp8: bool
    init: initial.Init

    @property
    def plain(self) -> object: ...
    def require_adapter(self) -> None: ...
    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]: ...
    def require_cut(self, parts: int) -> None: ...
    def require_divided(self, parts: int) -> None: ...
    def require_matrices_divided(self, parts: int) -> None: ...


def probe(recipe: ProbedModel) -> None:
    """Tests whether the model supports the kernels, memory optimizations, pretrained weights, packing, experts, and parallelism
    that the job uses."""
    configured, parallel = recipe.plain is None, recipe.job.train.parallel
    _require_kernels(recipe)
    _require_memory_savers(recipe)
    if configured:
        initial.probe(recipe.init, recipe.build)
    if recipe.document_mask:
        from heliostat.recipes.text import packing

        packing.require_apart(recipe)
    if recipe.pretrained:
        _require_weights(recipe)
    if recipe.adapter:
        recipe.require_adapter()
    if configured:
        expert_keys.require(recipe)
        expert_keys.require_router_loss(recipe, recipe.unbalanced)
    if parallel.expert > 1:
        recipe.require_divided(parallel.expert)
    if parallel.tensor > 1:
        recipe.require_matrices_divided(parallel.tensor)
    if recipe.tiled:
        from heliostat.recipes.text import tiled_loss

        tiled_loss.require(recipe)
    if parallel.sequence > 1:
        recipe.require_cut(parallel.sequence)


def _require_memory_savers(recipe: ProbedModel) -> None:
    """Raises ConfigError if the model doesn't support the tiled MLPs or the activation checkpointing that the job sets."""
    if recipe.tiled_mlp:
        from heliostat.recipes.text import tiled_mlp

        tiled_mlp.require(recipe)
    if recipe.checkpointing and (recipe.offload or recipe.checkpointing is not True):
        from heliostat.recipes.text import checkpointing

        checkpointing.require(recipe)


def _require_kernels(recipe: ProbedModel) -> None:
    """Raises ConfigError if the model doesn't support the kernels that the job names."""
    if recipe.attention:
        from heliostat.recipes.text import attention

        attention.require(recipe)
    if recipe.fp8:
        from heliostat.recipes.text import float8

        float8.require(recipe)
    if recipe.job.train.compile == "blocks":
        import torch

        with torch.device("meta"):
            if not recipe.blocks(recipe.plainly().build()):
                kind = recipe.config.model_type
                raise ConfigError(
                    f"train.compile: blocks: transformers doesn't list the layers of {kind!r}. Set this key to true"
                )


def _require_weights(recipe: ProbedModel) -> None:
    """Raises ConfigError if the folder also has an adapter, or if the job's keys change the shapes of the pretrained weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from heliostat.recipes.pretrained import require_no_adapter
    from heliostat.recipes.text import model_config

    require_no_adapter("model.pretrained", str(recipe.pretrained))
    if changed_keys := model_config.changed(recipe.job.model, adapters.KEY):
        with torch.device("meta"):
            model_config.require_same_weights(model_config.read(recipe.job.model), changed_keys, AutoModelForCausalLM.from_config)
