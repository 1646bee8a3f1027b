"""Sums the tokens that experts are given over a step's micro-batches and workers, and has the recipe balance by them.

The sums are integers, so they are the same to the last bit whatever the micro-batches and the number of workers. They stay on the
device until a report, unless the recipe balances by them: then workers add them up behind every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from heliostat.recipes.protocol import Recipe

if TYPE_CHECKING:
    from heliostat.engine.deepspeed_engine import DeepSpeedEngine


class ExpertLoad:
    def __init__(self, recipe: Recipe, engine: DeepSpeedEngine) -> None:
        self.recipe, self.engine = recipe, engine
        self._micro: list[torch.Tensor] = []  # of the step that is played
        self._steps: list[torch.Tensor] = []  # since the last report: summed over workers if the recipe balances

    def add(self, routed: torch.Tensor | None) -> None:
        """Adds a micro-batch's tokens by expert."""
        if routed is not None:
            self._micro.append(routed)

    def end_step(self) -> None:
        """Ends a step, with balancing if its weights changed; collective if the recipe balances."""
        if not self._micro:
            return
        routed, self._micro = torch.stack(self._micro).sum(0), []
        if self.recipe.balances:
            dist.all_reduce(routed)
            if self.engine.was_step_applied():
                self.recipe.balance(self.engine.module, routed)
        self._steps.append(routed)

    def report(self) -> dict[str, list[float]]:
        """Computes the load of the steps since the last report, a value each by name; collective."""
        if not self._steps:
            return {}
        steps, self._steps = torch.stack(self._steps), []
        if not self.recipe.balances:
            dist.all_reduce(steps)
        return {name: values.tolist() for name, values in load(steps.cpu()).items()}


def load(routed: torch.Tensor) -> dict[str, torch.Tensor]:
    """Describes the load of experts, int64 [steps, layers, experts + 1], step by step.

    `imbalance`: the tokens of the layer's busiest expert over the mean of all, 1 if they are even, averaged over layers;
    `imbalance_worst`: of the layer where it is largest; `unused`: the share of experts without a token; `dropped`: the share of
    assignments that no expert took.
    """
    given, whole = routed[..., :-1].double(), routed.double().sum((1, 2)).clamp(min=1)
    layers = given.amax(-1) / given.mean(-1).clamp(min=1e-9)
    return {
        "imbalance": layers.mean(-1),
        "imbalance_worst": layers.amax(-1),
        "unused": (given == 0).double().mean((1, 2)),
        "dropped": routed[..., -1].double().sum(-1) / whole,
    }
