"""Computes a micro-batch's share of the objective: its loss terms, and the other parts that the recipe's loss returns.

The objective of a step is its loss plus its weighted parts. The loss is the sum of all its terms, divided by their number. Each
part with a weight adds this weight times the part's mean over the step's micro-batches. DeepSpeed averages over micro-batches and
workers. This gives the right result for the parts. The sum of terms is scaled in advance, so that it is still a sum after the
averaging.

A loss that couples the samples of a step is computed once for all samples (`coupled`). A micro-batch's share is then the
contribution of its samples to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from heliostat.checkpoint.agreement import together
from heliostat.data import device_ranges
from heliostat.data.device_streams import LateRead
from heliostat.engine import deepspeed_engine
from heliostat.errors import ConfigError
from heliostat.recipes.protocol import GUIDE, Batch, CouplesSamples, Loss, Recipe
from heliostat.tracking.metrics import RESERVED
from heliostat.training.worker import coupled
from heliostat.training.worker.coupled import Terms
from heliostat.training.worker.micro_batches import Micro, seeded

if TYPE_CHECKING:
    from heliostat.engine.deepspeed_engine import DeepSpeedEngine


class LossShare(NamedTuple):
    """Holds a micro-batch's share: `objective`, the tensor for the backward pass; `loss`, the sum of its terms; `added`, its
    share of each part, one value per name; `routed`, its tokens by expert."""

    objective: torch.Tensor
    loss: torch.Tensor
    added: torch.Tensor | None
    routed: torch.Tensor | None


class Objective:
    """Computes the shares of micro-batches. `names`: the names of the parts, set by the first micro-batch."""

    def __init__(self, recipe: Recipe, averaged: int | None = None, progressed: Callable[[], None] = lambda: None) -> None:
        """Prepares the shares. `averaged`: the number of workers over which gradients are averaged [default: all]. `progressed`:
        called after every pass over a micro-batch."""
        self.recipe, self._averaged, self._progressed = recipe, averaged, progressed
        self.names: list[str] | None = None

    def shares(self, engine: DeepSpeedEngine, micros: Sequence[Micro], terms: Terms) -> Iterator[LossShare]:
        """Yields the shares of this worker's micro-batches of a step. `terms`: the number of loss terms over all workers.

        Run each share's backward pass before you request the next share.
        """
        number = len(micros) * (self._averaged or dist.get_world_size())
        if isinstance(self.recipe, CouplesSamples):
            yield from self._coupled(self.recipe, engine, micros, terms, number)
            return
        for _, batch in seeded(micros, engine.device, self.recipe, self._progressed):
            yield self.part(engine, batch, number, terms)

    def part(self, model: torch.nn.Module, batch: Batch, micros: int, terms: Terms) -> LossShare:
        """Computes a micro-batch's share. `micros`: the number of micro-batches of all workers in a step. `terms`: the number of
        their loss terms."""
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
        """Yields each micro-batch's share of a loss over all samples of the step.

        For the log, the loss is divided equally among the micro-batches.
        """
        with device_ranges.named("forward"):
            step = coupled.first_pass(recipe, engine, micros, self._checked, terms, self._progressed)
        loss, added = step.loss.sum.detach() / number, _added(step.loss, number)
        for micro, batch in seeded(micros, engine.device, recipe, self._progressed):
            with device_ranges.named("forward"):
                product = step.product(coupled.represented(recipe, engine, micro, batch), micro)
            yield LossShare(product * number, loss, added, None)

    def _checked(self, loss: object, name: str) -> Loss:
        """Returns the result of the recipe's method `name`.

        Raises ConfigError if the result isn't a Loss, or if the names of its parts have changed.
        """
        if not isinstance(loss, Loss):
            raise ConfigError(f"recipe: {self._whose}.{name} returned a {type(loss).__name__}, expected a Loss ({GUIDE})")
        if self.names is None:
            self._check(names := list(loss.parts))
            self.names = names
        if list(loss.parts) != self.names:
            raise ConfigError(
                f"recipe: {self._whose}.loss returned the parts {self.names} before, and {list(loss.parts)} now. "
                "Always return all parts, in the same order"
            )
        return loss

    def agree(self, group: dist.ProcessGroup) -> None:
        """Checks that all ranks have the same names of parts.

        If the names differ, raises ConfigError on every rank. All ranks call this method together.
        """
        everyones = together(group, lambda: self.names)
        if any(names != everyones[0] for names in everyones):
            raise ConfigError(
                f"recipe: {self._whose}.loss returns different parts on other workers: {everyones}. "
                "Always return all parts, in the same order"
            )

    @property
    def _whose(self) -> str:
        return type(self.recipe).__name__

    def _check(self, names: list[str]) -> None:
        for name in names:
            if name in RESERVED or not name.isidentifier():
                raise ConfigError(
                    f"recipe: {self._whose}.loss returns a part {name!r}, which can't be logged as train/{name}. "
                    f"Choose another name; reserved: {', '.join(RESERVED)}"
                )


def late_norm(engine: DeepSpeedEngine, clip: float, terms: Terms) -> LateRead:
    """Begins to copy a step's gradient norm to the host (`deepspeed_engine.gradient_norm`). If steps differ in their number of
    loss terms, copies this number together with the norm."""
    norm = deepspeed_engine.gradient_norm(engine, clip)
    return LateRead(torch.stack([norm.to(terms), terms]) if isinstance(terms, torch.Tensor) else norm)


def _added(loss: Loss, micros: int) -> torch.Tensor | None:
    """Returns a micro-batch's share of each part, fp32 [parts]; None without parts."""
    if not loss.parts:
        return None
    return torch.stack([part.value.detach().float().reshape(()) for part in loss.parts.values()]) / micros


class ExpertLoad:
    """Sums the tokens per expert over a step's micro-batches and workers, and lets the recipe balance the experts by these sums.

    The sums are integers, so they are bitwise equal for any micro-batches and number of workers. The sums stay on the device
    until a report. If the recipe balances experts by these sums, workers sum them after every step.
    """

    def __init__(self, recipe: Recipe, engine: DeepSpeedEngine) -> None:
        self.recipe, self.engine = recipe, engine
        self._micro: list[torch.Tensor] = []  # tokens by expert of each micro-batch of the current step
        self._steps: list[torch.Tensor] = []  # tokens by step, since the last report; summed over workers if experts are balanced

    def add(self, routed: torch.Tensor | None) -> None:
        """Adds a micro-batch's tokens by expert."""
        if routed is not None:
            self._micro.append(routed)

    def end_step(self) -> None:
        """Ends a step. If the step changed weights and the recipe balances experts, balances them, together with all workers."""
        if not self._micro:
            return
        routed, self._micro = torch.stack(self._micro).sum(0), []
        if self.recipe.balances:
            dist.all_reduce(routed)
            if self.engine.was_step_applied():
                self.recipe.balance(self.engine.module, routed)
        self._steps.append(routed)

    def report(self) -> dict[str, list[float]]:
        """Computes the load of the steps since the last report: by name, one value per step. All workers call this method
        together."""
        if not self._steps:
            return {}
        steps, self._steps = torch.stack(self._steps), []
        if not self.recipe.balances:
            dist.all_reduce(steps)
        return {name: values.tolist() for name, values in load(steps.cpu()).items()}


def load(routed: torch.Tensor) -> dict[str, torch.Tensor]:
    """Computes statistics of the experts' load per step.

    `routed`: tokens, int64 [steps, layers, experts + 1]; the last column counts assignments that no expert accepted.

    - `imbalance`: the tokens of a layer's busiest expert divided by the mean of all experts, averaged over layers; 1 if all
      experts have the same number of tokens
    - `imbalance_worst`: this ratio for the layer where it is largest
    - `unused`: the share of experts without a token
    - `dropped`: the share of assignments that no expert accepted
    """
    assigned, whole = routed[..., :-1].double(), routed.double().sum((1, 2)).clamp(min=1)
    layers = assigned.amax(-1) / assigned.mean(-1).clamp(min=1e-9)
    return {
        "imbalance": layers.mean(-1),
        "imbalance_worst": layers.amax(-1),
        "unused": (assigned == 0).double().mean((1, 2)),
        "dropped": routed[..., -1].double().sum(-1) / whole,
    }
