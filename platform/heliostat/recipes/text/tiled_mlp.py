"""Computes the MLP of each layer one tile of tokens after another, for `train.tiled_mlp`. So the MLP's inner activations exist
for only one tile at a time.

An MLP computes each token independently. The forward pass keeps only the MLP's input. The backward pass recomputes one tile after
another, and computes the tile's gradients. The backward pass sums the gradients of the weights over the tiles in fp32.

For autograd and ZeRO's hooks, the MLP is one operation with one gradient per parameter. ZeRO-3 gathers the parameters once for
each pass (`gathered_whole`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from heliostat.errors import ConfigError
from heliostat.parallel import tiny
from heliostat.parallel.language_model import LanguageModel
from heliostat.recipes.text import checkpointing, selective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "train.tiled_mlp"
NAMES = ("mlp", "feed_forward", "ffn")  # as transformers calls them
TOLERANCE = 1e-3  # relative difference of the loss, and of the gradient in fp32
TRIED = 7  # tokens per tile in trials, whose samples have more tokens

Compute = Callable[[torch.Tensor], torch.Tensor]


class ByteMeter(AbstractContextManager["ByteMeter"], Protocol):
    """Counts the bytes that autograd keeps for the computations inside the context."""

    total: int


class UnfitForTiles(Exception):
    """Reports why a model's MLPs can't be computed in tiles."""


def tile_rows(width: int) -> int:
    """Chooses the number of tokens per tile from the width of the MLP's input, so that a tile's inner activations are about as
    large as the MLP's matrices. Then the matrix multiplications stay compute-bound."""
    return width


TILE_ROWS = tile_rows  # the original, even while the plan replaces `tile_rows` to count operations


def use(model: torch.nn.Module, rows: int | None = None) -> None:
    """Makes a model's MLPs compute in tiles of `rows` tokens; the default is the number that `tile_rows` chooses.

    Raises UnfitForTiles if a layer has no MLP.
    """
    for mlp in modules(model):
        mlp.forward = partial(_forward, mlp, mlp.forward, rows)
        mlp.gathered_whole = True


def inside(mlp: Any, width: int, meter: ByteMeter) -> tuple[int, int]:
    """Computes one tile of an MLP inside the context `meter`, for the plan. Returns the tile's tokens, and the bytes that the
    meter counts."""
    _, compute, rows = mlp.forward.args
    rows = rows or TILE_ROWS(width)
    with meter:
        compute(torch.empty(1, rows, width, dtype=next(mlp.parameters()).dtype, requires_grad=True))
    return rows, int(meter.total)


def modules(model: torch.nn.Module) -> list[Any]:
    """Lists the MLPs of a model's layers. Raises UnfitForTiles if a layer has no MLP."""
    layers = []
    for layer in checkpointing.layers(model):
        own = [child for name, child in layer.named_children() if name in NAMES and not _sparse(child)]
        if len(own) != 1:
            raise UnfitForTiles("some layers have no MLP module")
        layers += own
    if not layers:
        raise UnfitForTiles("transformers doesn't list the model's layers")
    return layers


def _sparse(module: torch.nn.Module) -> bool:
    """Returns whether a module contains routed experts (mixture of experts)."""
    return any(name.rpartition(".")[2] == "experts" for name, _ in module.named_modules())


def _forward(mlp: torch.nn.Module, compute: Compute, rows: int | None, hidden: torch.Tensor, *more: object) -> torch.Tensor:
    if more:
        raise UnfitForTiles("the model's MLPs take other inputs in addition to the hidden state")
    rows = rows or tile_rows(hidden.shape[-1])
    if not torch.is_grad_enabled():
        return _in_tiles(compute, hidden, rows)
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return TiledMlp.apply(compute, rows, KeepForBackward.apply(hidden), *(p for p in mlp.parameters() if p.requires_grad))


def _in_tiles(compute: Compute, hidden: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([compute(tile) for tile in _tiles(hidden, rows)], 1).view(*hidden.shape[:-1], -1)


def _tiles(whole: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
    return whole.reshape(1, -1, whole.shape[-1]).split(rows, 1)


class KeepForBackward(torch.autograd.Function):
    """Keeps a tensor for the backward pass of the next operation.

    The recomputation of a checkpointed layer ends at the last kept tensor. So this recomputation skips the MLP, which recomputes
    its own tiles.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> torch.Tensor:
        return upstream[0]


class TiledMlp(torch.autograd.Function):
    """Computes an MLP in tiles of `rows` tokens, from the input that `KeepForBackward` keeps. Computes the gradients of the input
    and the weights in the same tiles."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, rows: int, hidden: torch.Tensor, *weights: torch.nn.Parameter) -> torch.Tensor:
        ctx.compute, ctx.rows, ctx.kept, ctx.weights = compute, rows, hidden.grad_fn, weights
        with selective.passing():
            return _in_tiles(compute, hidden, rows)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.kept.saved_tensors
        of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        totals = [torch.zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device) for w in ctx.weights]
        for tile, gradient, out in zip(*(_tiles(x, ctx.rows) for x in (hidden, upstream[0], of_hidden)), strict=True):
            tile = tile.detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.compute(tile)
            first, *rest = torch.autograd.grad(output, [tile, *ctx.weights], gradient)
            out.copy_(first)
            for total, part in zip(totals, rest, strict=True):
                total += part
        return None, None, of_hidden, *(total.to(w.dtype) for total, w in zip(totals, ctx.weights, strict=True))


# checks of an architecture --------------------------------------------------------------------------------------------


def require(recipe: LanguageModel) -> None:
    """Raises ConfigError unless every layer of the model has an MLP that computes each token independently, without random
    numbers."""
    kind, whole = recipe.config.model_type, copy.copy(recipe)
    whole.tiled_mlp = False
    fault = "the model's layers have experts instead of MLPs" if recipe.routes else tiny.tried(whole, _fault)
    if fault:
        raise ConfigError(f"{KEY}: not supported for {kind!r}: {fault}. Set this key to false")


def _fault(small: LanguageModel) -> str:
    """Compares the loss and the gradient of a small model with tiled and with complete MLPs. Returns "" if they are equal, else
    the reason."""
    try:
        model = small.build()
        if _draws(small, model):
            return "the model's MLPs draw random numbers, which differ in tiles (set the model's dropout to 0)"
        whole = tiny.loss_and_gradient(small, model)
        use(model, TRIED)
        same = tiny.same(whole, tiny.loss_and_gradient(small, model), TOLERANCE)
    except UnfitForTiles as e:
        return str(e)
    return "" if same else "the model's MLPs don't compute each token independently"


@torch.no_grad()
def _draws(small: LanguageModel, model: PreTrainedModel) -> bool:
    """Checks whether an MLP draws random numbers in training."""
    before, drew = list[torch.Tensor](), list[bool]()
    handles = [h for mlp in modules(model) for h in (
        mlp.register_forward_pre_hook(lambda *_: before.append(torch.get_rng_state())),
        mlp.register_forward_hook(lambda *_: drew.append(not torch.equal(before.pop(), torch.get_rng_state()))),
    )]  # fmt: skip
    small.loss(model, small.batch(tiny.tokens(small)))
    for handle in handles:
        handle.remove()
    return any(drew)
