"""Records the routing of a transformers model with experts: the tokens per expert, and the logits of the routers. Balances the
experts with the bias that a router adds to the scores of the experts.

This works for all architectures whose experts use transformers' interface (`use_experts_implementation`). In these architectures,
one module contains all experts of a layer, and gets the chosen experts of every token as an input.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch

BIASES = ("e_score_correction_bias", "expert_bias")  # routers add these biases to scores only to choose experts

_watches: weakref.WeakKeyDictionary[torch.nn.Module, RoutingWatch] = weakref.WeakKeyDictionary()


class ExpertLayer(torch.nn.Module):
    """Describes the transformers modules that contain all experts of a layer."""

    num_experts: int
    all_experts: int  # all experts of the layer, if the module contains only some of them
    has_post_expert_norm: bool


def layers(model: torch.nn.Module) -> list[ExpertLayer]:
    """Lists the modules that contain the experts of a layer, in the model's order."""
    modules = (m for m in model.modules() if hasattr(m, "_is_expert_parallel"))
    return [cast(ExpertLayer, m) for m in modules if isinstance(getattr(m, "num_experts", None), int)]


def number(layer: ExpertLayer) -> int:
    """Returns the number of all experts of a layer, even if the module contains only some of them (`divided_experts`)."""
    return int(getattr(layer, "all_experts", layer.num_experts))


def routers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, int]]:
    """Lists the routers in the model's order, each with the index of the logits in the router's output."""
    outputs = [getattr(m, "_can_record_outputs", None) or {} for m in model.modules()]
    logits = [one["router_logits"] for one in outputs if "router_logits" in one]
    kinds = {one.target_class: one.index for one in logits if getattr(one, "target_class", None)}
    return [(m, kinds[type(m)]) for m in model.modules() if type(m) in kinds]


def biases(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Lists the buffers that bias the choice of experts, with their names, in the model's order: one per layer of experts."""
    return [(name, b) for name, b in model.named_buffers() if name.rpartition(".")[2] in BIASES]


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[RoutingWatch]:
    """Records the routing of a model, or of an engine's model, during forward passes inside the context.

    Recomputation by activation checkpointing isn't recorded, because the recomputation runs later, outside the context.
    """
    module = getattr(model, "module", model)
    watch = _watches.get(module)
    if watch is None:
        watch = _watches[module] = RoutingWatch(module)
    watch.begin()
    try:
        yield watch
    finally:
        watch.end()


class RoutingWatch:
    """Contains the recorded routing. `routed`: int64 [layers, experts + 1], tokens per expert; the last column counts tokens
    without an expert; None for a model without experts. `logits`: the logits of each router, one tensor per router."""

    def __init__(self, model: torch.nn.Module) -> None:
        experts = layers(model)
        sizes = {number(m) for m in experts}
        self.shape = (len(experts), max(sizes) + 1) if len(sizes) == 1 else None  # layers of different sizes aren't counted
        self.on = False
        for layer, experts_of_layer in enumerate(experts if self.shape else ()):
            experts_of_layer.register_forward_pre_hook(partial(self._given, layer), with_kwargs=True)
        for module, place in routers(model):
            module.register_forward_hook(partial(self._said, place))
        self.end()

    def begin(self) -> None:
        self.on = True

    def end(self) -> None:
        """Stops recording and drops the recorded tensors, because the tensors keep autograd graphs in memory."""
        self.on = False
        self.routed: torch.Tensor | None = None
        self.logits: list[torch.Tensor] = []

    def z_loss(self) -> torch.Tensor:
        """Computes the mean over tokens and layers of log(sum(exp(logits)))^2 (Zoph et al. 2022, arXiv 2202.08906)."""
        return torch.stack([one.flatten(0, -2).float().logsumexp(-1).square().mean() for one in self.logits]).mean()

    def _given(self, layer: int, module: torch.nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        if not self.on or not self.shape:
            return
        chosen = named["top_k_index"] if "top_k_index" in named else args[1]
        if self.routed is None:
            self.routed = torch.zeros(self.shape, dtype=torch.int64, device=chosen.device)
        places = chosen.detach().flatten().long().clamp(max=self.shape[1] - 1)
        self.routed[layer].scatter_add_(0, places, torch.ones_like(places))

    def _said(self, place: int, module: torch.nn.Module, args: object, output: torch.Tensor | Sequence[torch.Tensor]) -> None:
        if self.on:
            self.logits.append(output[place] if isinstance(output, Sequence) else output)


@torch.no_grad()
def balance(model: torch.nn.Module, routed: torch.Tensor, rate: float) -> None:
    """Raises the bias of each expert that has fewer tokens than the mean of its layer by `rate`. Lowers the bias of each expert
    that has more tokens by `rate` (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437)."""
    chosen = routed[:, :-1]
    lacks = (chosen.sum(1, keepdim=True) - chosen * chosen.shape[1]).sign()  # exact, because these are integers
    for (_, bias), one in zip(biases(model), lacks, strict=True):
        bias.add_(one.to(bias.dtype).view_as(bias), alpha=rate)
