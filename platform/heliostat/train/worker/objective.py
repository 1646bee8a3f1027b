"""What a micro-batch gives the gradient: its loss terms, and whatever else the recipe adds to the objective.

The objective of a step is its loss (the sum of all its terms over their number) plus, for everything in the recipe's `added`,
the coefficient times the mean over the step's micro-batches. DeepSpeed averages over micro-batches and workers, which is just
right for what is added; the sum of terms is scaled so that it stays a sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from heliostat.recipes.protocol import Batch, Recipe


class Part(NamedTuple):
    """Of one micro-batch: what is played backwards; the sum of its terms; its share of what is added, one value a name."""

    objective: torch.Tensor
    loss: torch.Tensor
    added: torch.Tensor | None


class Objective:
    def __init__(self, recipe: Recipe, device: Any) -> None:
        self.recipe = recipe
        given: dict[str, float] = getattr(recipe, "added", {})
        self.names = list(given)
        self._coefficients = torch.tensor(list(given.values()), device=device)

    def part(self, model: Any, batch: Batch, micros: int, terms: Any) -> Part:
        """`micros`: of all workers in a step; `terms`: of all of them."""
        if not self.names:
            loss = self.recipe.loss(model, batch)
            return Part(loss * (micros / terms), loss.detach(), None)
        loss, added = self.recipe.losses(model, batch)
        objective = loss * (micros / terms) + (added * self._coefficients).sum()
        return Part(objective, loss.detach(), added.detach() / micros)
