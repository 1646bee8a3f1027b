"""Computes a micro-batch's share of the objective: its loss terms, and the other parts that the recipe's loss returns.

The objective of a step is its loss (the sum of all its terms over their number) plus, for every part with a weight, the weight
times the mean over the step's micro-batches. DeepSpeed averages over micro-batches and workers, which is exactly right for the
parts; the sum of terms is scaled so that it stays a sum. A loss that couples the samples of a step is computed once for all of
them (`coupled`), and a micro-batch's share is what its samples add to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from heliostat.checkpoint.agreement import together
from heliostat.data import device_ranges
from heliostat.errors import ConfigError
from heliostat.recipes.protocol import GUIDE, Batch, CouplesSamples, Loss, Recipe
from heliostat.tracking.metrics import RESERVED
from heliostat.training.worker import coupled
from heliostat.training.worker.coupled import Terms
from heliostat.training.worker.micro_batches import Micro, seeded

if TYPE_CHECKING:
    from heliostat.engine.deepspeed_engine import DeepSpeedEngine


class LossShare(NamedTuple):
    """Holds a micro-batch's share: the backward pass's tensor; the sum of its terms; its share of each part, one value a name;
    its tokens by expert."""

    objective: torch.Tensor
    loss: torch.Tensor
    added: torch.Tensor | None
    routed: torch.Tensor | None


class Objective:
    """Computes the shares of micro-batches; `names`: of the parts, as the first micro-batch gave them."""

    def __init__(self, recipe: Recipe, averaged: int | None = None, progressed: Callable[[], None] = lambda: None) -> None:
        """Prepares it; `averaged`: over how many workers gradients are averaged, if that is not all; `progressed` is called after
        every pass over a micro-batch."""
        self.recipe, self._averaged, self._progressed = recipe, averaged, progressed
        self.names: list[str] | None = None

    def shares(self, engine: DeepSpeedEngine, micros: Sequence[Micro], terms: Terms) -> Iterator[LossShare]:
        """Yields the shares of this worker's micro-batches of a step; `terms`: the loss terms of all workers'. The backward pass
        of each is to come before the next is asked for."""
        number = len(micros) * (self._averaged or dist.get_world_size())
        if isinstance(self.recipe, CouplesSamples):
            yield from self._coupled(self.recipe, engine, micros, terms, number)
            return
        for _, batch in seeded(micros, engine.device, self.recipe, self._progressed):
            yield self.part(engine, batch, number, terms)

    def part(self, model: torch.nn.Module, batch: Batch, micros: int, terms: Terms) -> LossShare:
        """Computes a micro-batch's share; `micros`: micro-batches of all workers in a step; `terms`: their loss terms."""
        with device_ranges.named("forward"):
            loss = self._checked(self.recipe.loss(model, batch), "loss")
        objective = loss.sum * (micros / terms)
        for part in loss.parts.values():
            if part.weight:
                objective = objective + part.value.float() * part.weight
        return LossShare(objective, loss.sum.detach(), _added(loss, micros), loss.routed)

    def _coupled(
        self, recipe: CouplesSamples, engine: DeepSpeedEngine, micros: Sequence[Micro], terms: Terms, number: int
    ) -> Iterator[LossShare]:
        """Yields the shares of micro-batches in a loss of all samples: of the loss itself each has as much as any other."""
        with device_ranges.named("forward"):
            step = coupled.first_pass(recipe, engine, micros, self._checked, terms, self._progressed)
        loss, added = step.loss.sum.detach() / number, _added(step.loss, number)
        for micro, batch in seeded(micros, engine.device, recipe, self._progressed):
            with device_ranges.named("forward"):
                product = step.product(coupled.represented(recipe, engine, micro, batch), micro)
            yield LossShare(product * number, loss, added, None)

    def _checked(self, loss: object, name: str) -> Loss:
        """Returns what the recipe's method gave; ConfigError if it is no loss, or names other parts than before."""
        if not isinstance(loss, Loss):
            raise ConfigError(f"recipe: {self._whose}.{name} returned a {type(loss).__name__}, expected a Loss ({GUIDE})")
        if self.names is None:
            self._check(names := list(loss.parts))
            self.names = names
        if list(loss.parts) != self.names:
            raise ConfigError(
                f"recipe: {self._whose}.loss named the parts {self.names} before, and {list(loss.parts)} now. "
                "Always name all, in the same order"
            )
        return loss

    def agree(self, group: dist.ProcessGroup) -> None:
        """Checks that all ranks have the same names of parts, else raises a ConfigError on every rank; collective."""
        everyones = together(group, lambda: self.names)
        if any(names != everyones[0] for names in everyones):
            raise ConfigError(
                f"recipe: {self._whose}.loss names different parts on other workers: {everyones}. Always name all of them"
            )

    @property
    def _whose(self) -> str:
        return type(self.recipe).__name__

    def _check(self, names: list[str]) -> None:
        for name in names:
            if name in RESERVED or not name.isidentifier():
                raise ConfigError(
                    f"recipe: {self._whose}.loss names a part {name!r}, which can't be logged as train/{name}. "
                    f"Choose another name; reserved: {', '.join(RESERVED)}"
                )


def _added(loss: Loss, micros: int) -> torch.Tensor | None:
    """Returns a micro-batch's share of each part, a value a name."""
    if not loss.parts:
        return None
    return torch.stack([part.value.detach().float().reshape(()) for part in loss.parts.values()]) / micros


class ExpertLoad:
    """Sums the tokens that experts are given over a step's micro-batches and workers, and has the recipe balance by them.

    The sums are integers, so they are the same to the last bit whatever the micro-batches and the number of workers. They stay on
    the device until a report, unless the recipe balances by them: then workers add them up after every step.
    """

    def __init__(self, recipe: Recipe, engine: DeepSpeedEngine) -> None:
        self.recipe, self.engine = recipe, engine
        self._micro: list[torch.Tensor] = []  # of the present step
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
    assigned, whole = routed[..., :-1].double(), routed.double().sum((1, 2)).clamp(min=1)
    layers = assigned.amax(-1) / assigned.mean(-1).clamp(min=1e-9)
    return {
        "imbalance": layers.mean(-1),
        "imbalance_worst": layers.amax(-1),
        "unused": (assigned == 0).double().mean((1, 2)),
        "dropped": routed[..., -1].double().sum(-1) / whole,
    }
