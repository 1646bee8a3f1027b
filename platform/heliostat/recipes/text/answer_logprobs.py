"""Computes the log-probabilities of answers: the sums of their tokens' log-probabilities in nats.

Gradients need no complete fp32 copy of the logits. With `tiled`, the logits themselves exist only for one tile of tokens: the
backward pass recomputes them, because a token's gradient depends on the complete answer's log-probability.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from heliostat.recipes.protocol import IGNORED, Batch
from heliostat.recipes.text import masks, next_token, preference_rows, tiled_loss


def of_pairs(model: torch.nn.Module, batch: Batch, tiled: bool = False) -> torch.Tensor:
    """Computes the log-probabilities of the chosen and the rejected answers of a batch (`preference_rows`), fp64 [pairs, 2]."""
    tokens, labels = batch["input_ids"].flatten(0, 1), batch["labels"].flatten(0, 1)
    return answer_logprobs(model, tokens, labels, preference_rows.last(batch), tiled).view(-1, 2)


def answer_logprobs(
    model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor, last: int, tiled: bool = False
) -> torch.Tensor:
    """Sums the log-probabilities of the labels of each sequence, fp64 [sequences].

    `tokens`: int64 [sequences, length], padded at the end. `labels`: the tokens of the answers, IGNORED elsewhere. `last`: the
    number of final positions that contain all labels and the token before each. Logits are computed only for these positions if
    the model supports this.
    """
    goals = next_token.targets({"labels": labels})
    kept = {}
    if last < tokens.shape[1] and _keeps(model):
        goals, kept = goals[:, -last:].contiguous(), {"logits_to_keep": last}
    with masks.unread(whole=True):
        if tiled:
            with tiled_loss.answering(model, lambda h, w, b: TiledTokenLogprobs.apply(h.flatten(0, 1), w, b, goals.flatten())):
                each = model(input_ids=tokens, **kept).logits
        else:
            each = TokenLogprobs.apply(model(input_ids=tokens, **kept).logits.flatten(0, 1), goals.flatten())
    return each.view(goals.shape).double().sum(1)


def _keeps(model: torch.nn.Module) -> bool:
    """Checks whether a model can compute the logits of only the last positions."""
    kind: Any = type(getattr(model, "module", model))
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


class TokenLogprobs(torch.autograd.Function):
    """Computes the log-probability of each target from logits [tokens, vocabulary], fp32 [tokens]; 0 where a target is IGNORED.

    If the logits need a gradient, the forward pass computes it too, one block of rows after another, as `SummedCrossEntropy`
    does.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        rows, values = next_token.block_rows(logits), list[torch.Tensor]()
        for start in range(0, len(logits), rows):
            some = slice(start, start + rows)
            scores = torch.log_softmax(logits[some], dim=1, dtype=torch.float32)
            values.append(_taken(scores, targets[some]))
            if gradient is not None:
                gradient[some] = _gradient(scores, targets[some])
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[0].unsqueeze(1)), None


class TiledTokenLogprobs(torch.autograd.Function):
    """Computes TokenLogprobs of F.linear(hidden, weight, bias), one tile of tokens after another."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        rows = tiled_loss.tile_rows(hidden, len(weight))
        tiles = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat([_taken(F.linear(tile, weight, bias).log_softmax(1, dtype=torch.float32), goal) for tile, goal in tiles])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        of_hidden, rows = torch.empty_like(hidden), tiled_loss.tile_rows(hidden, len(weight))
        of_weight = tiled_loss.fp32_sums(weight) if ctx.needs_input_grad[1] else None  # not if an adapter is trained
        of_bias = tiled_loss.fp32_sums(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), rows):
            some = slice(start, start + rows)
            scores = F.linear(hidden[some], weight, bias).log_softmax(1, dtype=torch.float32)
            gradient = _gradient(scores, targets[some]).mul_(upstream[0][some].unsqueeze(1)).to(weight.dtype)
            torch.mm(gradient, weight, out=of_hidden[some])
            if of_weight is not None:
                of_weight += gradient.t().mm(hidden[some])
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=torch.float32)
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        return of_hidden, of_weight, None if of_bias is None else of_bias.to(weight.dtype), None


def _taken(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Takes the targets' log-probabilities out of all log-probabilities, fp32 [tokens, vocabulary]."""
    return scores.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1) * (targets != IGNORED)


def _gradient(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Converts log-probabilities, fp32 [tokens, vocabulary], in place to the gradients of the targets' log-probabilities with
    respect to the logits."""
    at = targets.clamp(min=0).unsqueeze(1)
    scores.exp_().neg_().scatter_add_(1, at, scores.new_ones(()).expand_as(at))
    return scores.mul_((targets != IGNORED).unsqueeze(1))
