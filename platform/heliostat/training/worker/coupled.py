"""Computes the gradients of a loss that couples all samples of a step, in two passes (GradCache: Gao et al. 2021, arXiv
2101.06983).

First, every worker represents its micro-batches without gradients. An all-gather gives all workers the representations of all the
step's samples, in sample order. Each worker computes the loss of all these samples, and the loss's gradients with respect to the
representations.

Second, each worker represents each micro-batch again, with the same random numbers as in the first pass. The worker computes the
inner product of these representations with the gradients from the first pass. The backward pass of this product gives the
micro-batch's contribution to the gradient of the loss. So the loss doesn't depend on how samples are divided into micro-batches
and workers. The model's activations take the memory of one micro-batch.

The cost of coupling grows with the square of the number of samples. In a step of more than SHARED_FROM samples, each worker
computes the contribution of its share of the samples (`couple_some`), one block at a time. The workers then sum losses and
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist

from heliostat.data.device_streams import upload
from heliostat.errors import ConfigError
from heliostat.recipes.protocol import GUIDE, Batch, CouplesSamples, Loss, Part
from heliostat.training.worker.micro_batches import Micro, seeded

if TYPE_CHECKING:
    from heliostat.engine.deepspeed_engine import DeepSpeedEngine

Tensors = dict[str, torch.Tensor]
Terms = int | torch.Tensor  # the number of a step's loss terms over all workers
Checked = Callable[[object, str], Loss]  # (result of a recipe's method, name of the method) -> the result, if it is a valid Loss

SHARED_FROM = 1024  # samples of a step, and of a block. Up to this number, each worker couples all samples: one matrix of 4 MiB


class CouplesSome(Protocol):
    """Describes a recipe with a shareable loss: in steps of more than SHARED_FROM samples, each worker computes a part of the
    loss."""

    def couple_some(self, vectors: Tensors, some: slice) -> Loss:
        """Computes the contribution of `some` of a step's samples to the loss of all samples, and to the loss's parts.

        The contributions add up to the result of `couple`.
        """


class CoupledStep(NamedTuple):
    """Holds the loss of a step, and the gradients of its objective with respect to the floating-point representations, in the
    order of the sorted `keys`."""

    loss: Loss
    keys: torch.Tensor
    gradients: Tensors

    def product(self, representations: Tensors, micro: Micro) -> torch.Tensor:
        """Computes the inner product of a micro-batch's representations with their gradients."""
        places = torch.searchsorted(self.keys, upload(torch.from_numpy(micro.keys), self.keys.device))
        products = [(representations[name].float() * whole[places]).sum() for name, whole in self.gradients.items()]
        return torch.stack(products).sum()


def represented(recipe: CouplesSamples, engine: DeepSpeedEngine, micro: Micro, batch: Batch) -> Tensors:
    """Represents the samples of a micro-batch that is on the device.

    Raises ConfigError if the first dimension of a representation isn't the number of samples.
    """
    representations = recipe.represent(engine, batch)
    for name, tensor in representations.items():
        if tensor.dim() == 0 or len(tensor) != len(micro.keys):
            raise ConfigError(
                f"recipe: {type(recipe).__name__}.represent returns {name!r} of shape {list(tensor.shape)} for "
                f"{len(micro.keys)} samples. Return [{len(micro.keys)}, ...] ({GUIDE})"
            )
    return representations


def first_pass(
    recipe: CouplesSamples,
    engine: DeepSpeedEngine,
    micros: Sequence[Micro],
    checked: Checked,
    terms: Terms,
    progressed: Callable[[], None],
) -> CoupledStep:
    """Represents this worker's micro-batches without gradients, and computes the loss over all workers' samples, and the
    gradients of this loss.

    All workers call this function together. `terms`: the step's number of loss terms. `progressed`: called after each
    micro-batch.
    """
    with torch.no_grad():
        mine = [represented(recipe, engine, micro, batch) for micro, batch in seeded(micros, engine.device, recipe, progressed)]
        keys, order = _from_all(upload(torch.from_numpy(np.concatenate([m.keys for m in micros])), engine.device)).sort()
        representations = {name: _from_all(torch.cat([one[name] for one in mine]))[order] for name in sorted(mine[0])}
    leaves = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in representations.items()}
    if len(keys) > SHARED_FROM and recipe.shares_coupling():
        loss, gradients = _shared(recipe, leaves, checked, terms)
        return CoupledStep(loss, keys, gradients)
    loss = checked(recipe.couple(leaves), "couple")
    return CoupledStep(loss, keys, _gradients(recipe, leaves, loss, terms))


def _gradients(recipe: CouplesSamples, leaves: Tensors, loss: Loss, terms: Terms) -> Tensors:
    if not loss.sum.requires_grad:
        raise ConfigError(
            f"recipe: {type(recipe).__name__}.couple uses none of the floating-point representations. "
            f"Compute the loss from these representations ({GUIDE})"
        )
    trained = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(objective(loss, terms), list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}


def _shared(recipe: CouplesSamples, leaves: Tensors, checked: Checked, terms: Terms) -> tuple[Loss, Tensors]:
    """Computes the loss and its gradients together with the other workers, which all call this function.

    Each worker has a slice of the samples, in sample order.
    """
    number, rank, world = len(next(iter(leaves.values()))), dist.get_rank(), dist.get_world_size()
    begin, end = number * rank // world, number * (rank + 1) // world
    totals = {name: torch.zeros_like(tensor) for name, tensor in leaves.items() if tensor.requires_grad}
    sums, parts, shares = list[torch.Tensor](), dict[str, Part](), cast("CouplesSome", recipe)
    for first in range(begin, end, SHARED_FROM):
        loss = checked(shares.couple_some(leaves, slice(first, min(first + SHARED_FROM, end))), "couple_some")
        for name, gradient in _gradients(recipe, leaves, loss, terms).items():
            totals[name] += gradient
        parts = loss.parts
        sums.append(torch.stack([loss.sum.detach().float(), *(part.value.detach().float() for part in parts.values())]))
    whole = torch.stack(sums).sum(0)
    for tensor in (whole, *totals.values()):
        dist.all_reduce(tensor)
    return Loss(whole[0], {name: Part(value, parts[name].weight) for name, value in zip(parts, whole[1:], strict=True)}), totals


def objective(loss: Loss, terms: Terms) -> torch.Tensor:
    """Computes the objective to minimize for a complete step: the sum of its terms divided by their number, plus the weighted
    parts.
    """
    return sum((part.value.float() * part.weight for part in loss.parts.values() if part.weight), loss.sum / terms)


def _from_all(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers the tensors of all workers, and concatenates them. Floating-point tensors become fp32."""
    tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)
