"""Implements the elementwise update rules that torch lacks, on one base class: Lion, and schedule-free AdamW.

ZeRO gives each worker its complete share as one tensor. A rule processes this tensor in pieces, so that temporary tensors stay
small.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TypedDict, cast

import torch

PIECE = 1 << 24  # elements per piece
ITERATE, AVERAGE = "z", "ema"

State = dict[str, torch.Tensor]  # state tensors of one parameter, by name


class Hyperparameters(TypedDict):
    """Describes the hyperparameters that update rules read from a parameter group."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    warmup: int


class UpdateRule(torch.optim.Optimizer):
    """Updates each parameter separately. A parameter's state is created at its first step. The entry `step` of the state counts
    the parameter's steps."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state |= {"step": torch.zeros(()), **self.begin(p)}
                    state["step"] += 1
                    self.update(p, p.grad.reshape(-1), cast(Hyperparameters, group), state)

    @abstractmethod
    def begin(self, p: torch.Tensor) -> State:
        """Creates the state of a parameter before its first step."""

    @abstractmethod
    def update(self, p: torch.Tensor, gradient: torch.Tensor, group: Hyperparameters, state: State) -> None:
        """Updates a parameter in place from its flat gradient and its state."""


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields, for each range of at most PIECE elements, a tuple of flat views: that range of every tensor."""
    return zip(*(t.view(-1).split(PIECE) for t in tensors), strict=True)


class LionStep(UpdateRule):
    """Updates parameters by Lion: by the sign of an interpolated momentum, `exp_avg` (Chen et al. 2023, arXiv 2302.06675)."""

    def __init__(self, groups: list[dict[str, object]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    def begin(self, p: torch.Tensor) -> State:
        return {"exp_avg": torch.zeros_like(p)}

    def update(self, p: torch.Tensor, gradient: torch.Tensor, group: Hyperparameters, state: State) -> None:
        (now, later), lr = group["betas"], group["lr"]
        p.mul_(1 - lr * group["weight_decay"])
        for part, grad, average in pieces(p, gradient, state["exp_avg"]):
            part.add_(average.lerp(grad, 1 - now).sign_(), alpha=-lr)
            average.lerp_(grad, 1 - later)


class ScheduleFreeStep(UpdateRule):
    """Updates by schedule-free AdamW: an average of the iterates replaces a decaying rate (Defazio et al. 2024, arXiv
    2405.15682).

    The parameters are y = (1 - beta1) z + beta1 x. Gradients are computed at y. z is the iterate, which AdamW without a first
    moment updates. x is the average, which is evaluated and exported. z and x begin as the parameter. x is stored, not recomputed
    from y and z, so that checkpoints contain x in the same form as other averages of weights.
    """

    def __init__(self, groups: list[dict[str, object]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "warmup": 0})

    def begin(self, p: torch.Tensor) -> State:
        return {"exp_avg_sq": torch.zeros_like(p), ITERATE: p.detach().clone(), AVERAGE: p.detach().clone()}

    def update(self, p: torch.Tensor, gradient: torch.Tensor, group: Hyperparameters, state: State) -> None:
        step, lr, (towards, decay) = int(state["step"]), group["lr"], group["betas"]
        share, unbiased = average_weight(step, group["warmup"]), 1 - decay**step
        for y, grad, square, z, x in pieces(p, gradient, state["exp_avg_sq"], state[ITERATE], state[AVERAGE]):
            square.mul_(decay).addcmul_(grad, grad, value=1 - decay)
            change = grad / (square / unbiased).sqrt_().add_(group["eps"])
            z.sub_(change.add_(y, alpha=group["weight_decay"]), alpha=lr)
            x.lerp_(z, share)
            y.copy_(z.lerp(x, towards))


def average_weight(step: int, warmup: int) -> float:
    """Computes the weight of step number `step`, counted from 1, in the average of the steps 1 to `step`. Weights are
    proportional to squared learning rates."""
    if step <= warmup:
        return 6 * step / ((step + 1) * (2 * step + 1))
    return 1 / ((warmup + 1) * (2 * warmup + 1) / (6 * warmup) + step - warmup if warmup else step)
