"""Computes next-token prediction for `CausalLM`: batches, the loss and the held-out scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import BackwardCFunction, FunctionCtx

from heliostat.parallel import experts
from heliostat.recipes.batches import segments
from heliostat.recipes.protocol import IGNORED, Batch, Loss, Part
from heliostat.recipes.text import expert_keys, masks, tiled_loss


class Outputs(Protocol):
    """Lists the model outputs that the loss and the scores use: logits [batch, tokens, vocabulary], and the router's loss if
    there is one."""

    logits: torch.Tensor
    aux_loss: torch.Tensor


def batch(content: np.ndarray, end: int | None) -> Batch:
    """Makes a batch of samples, int32 [batch, length]. `end`: the token that ends documents, if attention keeps documents apart;
    else None."""
    tokens = torch.from_numpy(np.ascontiguousarray(content)).long()
    labels = tokens.clone()
    labels[:, 0] = IGNORED
    batch_tensors = {"input_ids": tokens, "labels": labels}
    if end is not None:
        documents = segments(tokens, end)
        labels[documents.starts] = IGNORED
        batch_tensors["position_ids"] = documents.positions
    return batch_tensors


def cut(batch: Batch, part: int, parts: int) -> Batch:
    """Cuts range `part` of `parts` equal ranges out of a batch. Tokens keep their positions. The target of a range's last token
    comes from the next range."""
    tokens = batch["input_ids"]
    size = tokens.shape[1] // parts
    mine = slice(part * size, (part + 1) * size)
    positions = batch.get("position_ids", torch.arange(tokens.shape[1]).expand(len(tokens), -1))
    whole = {"input_ids": tokens, "position_ids": positions, "targets": targets(batch)}
    return {name: tensor[:, mine].contiguous() for name, tensor in whole.items()}


def terms(batch: Batch) -> int:
    return int((targets(batch) != IGNORED).sum())


def targets(batch: Batch) -> torch.Tensor:
    """Returns the target of each token, which is the label of the next token. At a sample's end, the target is IGNORED (not in
    the loss)."""
    return batch["targets"] if "targets" in batch else F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]


@dataclass(frozen=True)
class Routing:
    """Describes the extra computations of a mixture of experts. `weight`, `z_weight`: weights of the router's loss and of its
    z-loss (None or 0: not used). `counted`: whether to count the tokens of each expert."""

    weight: float | None = None
    z_weight: float = 0.0
    counted: bool = False


def loss(model: torch.nn.Module, batch: Batch, routing: Routing, tiled: bool = False) -> Loss:
    """Sums the cross entropy of a batch's tokens, and adds the losses of experts. `tiled`: doesn't materialize all logits."""
    if not routing.counted:
        summed, outputs = _summed(model, batch, tiled)
        return Loss(summed, _parts(outputs, routing, None))
    with experts.watched(model) as seen:
        summed, outputs = _summed(model, batch, tiled)
        return Loss(summed, _parts(outputs, routing, seen), seen.routed)


def _summed(model: torch.nn.Module, batch: Batch, tiled: bool) -> tuple[torch.Tensor, Outputs]:
    if tiled:
        with tiled_loss.summed(model, targets(batch)):
            outputs = _outputs(model, batch)
        return outputs.logits, outputs
    outputs = _outputs(model, batch)
    return SummedCrossEntropy.apply(*_flat(outputs, batch)), outputs


def _parts(outputs: Outputs, routing: Routing, seen: experts.RoutingWatch | None) -> dict[str, Part]:
    parts = {} if routing.weight is None else {expert_keys.ROUTER_LOSS: Part(outputs.aux_loss, routing.weight)}
    if routing.z_weight and seen:
        parts[expert_keys.ROUTER_Z_LOSS] = Part(seen.z_loss(), routing.z_weight)
    return parts


def evaluate(
    model: torch.nn.Module, batch: Batch, end: int, token_bytes: torch.Tensor, tiled: bool = False
) -> dict[str, torch.Tensor]:
    """Scores each sample: nats, predicted tokens, and their bytes. `token_bytes`: int64 [2, vocabulary], the bytes of a token
    inside a document and as a document's first token, on the batch's device. `tiled`: doesn't materialize all logits."""
    goals, losses = targets(batch), _each(model, batch, tiled_loss.losses, tiled)
    predicted = goals != IGNORED
    first = batch["input_ids"] == end  # the target is a document's first token
    size = token_bytes[first.long(), goals.clamp(min=0)]
    return {"nats": losses.sum(1), "tokens": predicted.sum(1).float(), "bytes": (size * predicted).sum(1).float()}


def accuracy(model: torch.nn.Module, batch: Batch, tiled: bool = False) -> dict[str, torch.Tensor]:
    """Scores each sample: nats, predicted tokens, and `right`, the number of tokens that are the model's first choice. `tiled`:
    doesn't materialize all logits."""
    losses, right = _each(model, batch, tiled_loss.losses_and_hits, tiled).unbind(-1)
    return {"nats": losses.sum(1), "tokens": (targets(batch) != IGNORED).sum(1).float(), "right": right.sum(1)}


def _each(model: torch.nn.Module, batch: Batch, measure: tiled_loss.Measure, tiled: bool) -> torch.Tensor:
    """Computes the values of each token, [batch, length, ...]."""
    goals = targets(batch)
    if tiled:
        with tiled_loss.each(model, goals, measure):
            values = _outputs(model, batch).logits
    else:
        values = measure(*_flat(_outputs(model, batch), batch))
    return values.view(*goals.shape, *values.shape[1:])


def _outputs(model: torch.nn.Module, batch: Batch) -> Outputs:
    with masks.unread(whole="position_ids" not in batch):
        return model(**{k: v for k, v in batch.items() if k not in ("labels", "targets")})


def _flat(outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Flattens logits to [tokens, vocabulary], and the targets to [tokens]. Doesn't slice the logits, because a slice copies them
    in both passes."""
    return outputs.logits.flatten(0, 1), targets(batch).flatten()


def block_rows(logits: torch.Tensor) -> int:
    """Chooses the number of rows of logits per block of the loss, so that a block fits into CPU caches, or keeps a GPU busy."""
    return max(1, (1 << 20 if logits.device.type == "cpu" else 1 << 26) // logits.shape[1])


class SummedCrossEntropy(torch.autograd.Function):
    """Computes F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum") in much less memory.

    The forward pass computes the gradient together with the loss, one block of rows after another, so no complete fp32 copy of
    the logits exists. At 8,192 tokens and a vocabulary of 128,256, that saves 8 GB. On a CPU, this version is as fast as torch's
    version.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        rows = block_rows(logits)
        for block, goal, out in zip(logits.split(rows), targets.split(rows), gradient.split(rows), strict=True):
            loss, scores = tiled_loss.cross_entropy(block, goal)
            total += loss
            out.copy_(scores)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: BackwardCFunction, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[0]), None
