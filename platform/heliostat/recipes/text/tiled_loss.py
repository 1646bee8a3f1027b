"""Computes the logits and their cross entropy one tile of tokens after another, for `train.tiled_loss`.

During a pass, the model's last layer gets the targets, and returns losses instead of logits. It computes the gradients of each
tile together with the tile's losses. So there are as many matrix multiplications as with complete logits. Only the gradient of
the layer's input, and the gradient of the layer's weight in fp32, are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from heliostat.errors import ConfigError
from heliostat.parallel import tiny
from heliostat.parallel.language_model import LanguageModel
from heliostat.recipes.protocol import IGNORED

if TYPE_CHECKING:
    pass

KEY = "train.tiled_loss"
TOLERANCE = 1e-3  # relative difference of the loss, and of the gradient in fp32
Answer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits [tokens, vocabulary], targets [tokens] -> [tokens, ...]


def tile_rows(hidden: torch.Tensor, vocabulary: int) -> int:
    """Chooses the number of tokens per tile, such that a tile's logits keep a GPU busy. On a CPU, tiles are smaller."""
    return max(1, (1 << 22 if hidden.device.type == "cpu" else 1 << 28) // vocabulary)


@contextmanager
def summed(model: torch.nn.Module, targets: torch.Tensor) -> Iterator[None]:
    """Opens a context in which the model's forward pass returns the sum of the tokens' losses instead of logits."""
    with answering(model, lambda hidden, weight, bias: TiledCrossEntropy.apply(hidden, weight, bias, targets)):
        yield


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Computes each token's loss in fp32, [tokens], from logits [tokens, vocabulary]."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")


def losses_and_hits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Computes each token's loss, and 1 if the target has the largest logit, else 0: fp32 [tokens, 2]."""
    return torch.stack([losses(logits, targets), (logits.argmax(-1) == targets).float()], -1)


@contextmanager
def each(model: torch.nn.Module, targets: torch.Tensor, measure: Measure) -> Iterator[None]:
    """Opens a context in which the model's forward pass returns the values of `measure` for each token instead of the token's
    logits, without gradients."""

    def measured(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = tile_rows(hidden, len(weight))
        tiles = zip(hidden.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True)
        return torch.cat([measure(F.linear(tile, weight, bias), goal) for tile, goal in tiles])

    with answering(model, measured):
        yield


@contextmanager
def answering(model: torch.nn.Module, answer: Answer) -> Iterator[None]:
    """Makes the last layer return the result of `answer`, a function of its input, weight, and bias. The call is inside the
    layer, where ZeRO-3 has gathered the weight and bias."""
    module: Any = getattr(model, "module", model)
    head = module.get_output_embeddings()
    head.forward = lambda hidden: answer(hidden, head.weight, head.bias)
    try:
        yield
    finally:
        del head.forward


class TiledCrossEntropy(torch.autograd.Function):
    """Computes the sum of F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, ignore_index=IGNORED)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        rows, flat = tile_rows(hidden, len(weight)), hidden.flatten(0, -2)
        of_hidden, of_bias = torch.empty_like(flat), None if bias is None else fp32_sums(bias)
        of_weight = fp32_sums(weight) if ctx.needs_input_grad[1] else None  # not if an adapter is trained
        total = torch.zeros((), device=hidden.device)
        for tile, goal, out in zip(flat.split(rows), targets.flatten().split(rows), of_hidden.split(rows), strict=True):
            loss, gradient = cross_entropy(F.linear(tile, weight, bias), goal)
            total += loss
            gradient = gradient.to(weight.dtype)
            torch.mm(gradient, weight, out=out)
            if of_weight is not None:
                of_weight += gradient.t().mm(tile)
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=torch.float32)
        ctx.save_for_backward(of_hidden.view(hidden.shape), of_weight, of_bias)
        ctx.type = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        by = upstream[0]
        of_bias = None if of_bias is None else of_bias.mul_(by).to(ctx.type)
        of_weight = None if of_weight is None else of_weight.mul_(by).to(ctx.type)
        return of_hidden.mul_(by), of_weight, of_bias, None


def fp32_sums(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the sum of the tokens' losses, and the logits' gradient in fp32."""
    counted, at = targets != IGNORED, targets.clamp(min=0).unsqueeze(1)
    scores = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    total = -(scores.gather(1, at).squeeze(1) * counted).sum()
    scores.exp_().scatter_add_(1, at, scores.new_full((), -1.0).expand_as(at))
    return total, scores.mul_(counted.unsqueeze(1))


# checks of an architecture --------------------------------------------------------------------------------------------


def require(recipe: LanguageModel) -> None:
    """Raises ConfigError unless the model's logits are the outputs of its last layer, without later changes."""
    fault = tiny.tried(recipe, _fault)
    if fault:
        raise ConfigError(f"{KEY}: not supported for {recipe.config.model_type!r}: {fault}. Set this key to false")


def _fault(small: LanguageModel) -> str:
    """Compares the loss and the gradient of a small model with and without tiles. Returns "" if they match, else the reason."""
    model = small.build()
    if model.get_output_embeddings() is None:
        return "the model has no output layer"
    faults = []
    for small.tiled in (False, True):
        faults.append(tiny.loss_and_gradient(small, model))
    whole, mine = faults
    return (
        ""
        if tiny.same(whole, mine, TOLERANCE)
        else "the model changes the logits after the last layer, for example by a scale or a cap"
    )
