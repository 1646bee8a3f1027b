"""Updates by AdamW without a schedule (Defazio et al. 2024, arXiv 2405.15682): an average of the iterates stands for the decay.

The parameters are where gradients are taken, y = (1 - beta1) z + beta1 x: between the iterate z, which AdamW without a first
moment steps, and the average x, which is evaluated and exported. x is kept, not recovered from y and z, so that a checkpoint
holds it as it does other averages of weights.
"""

from __future__ import annotations

from typing import Any

import torch

from heliostat.optim.pieces import pieces

ITERATE, AVERAGE = "z", "ema"


def weight(step: int, warmup: int) -> float:
    """Computes the share of step number `step`, from 1, in the average of all steps so far, by the squares of their rates."""
    if step <= warmup:
        return 6 * step / ((step + 1) * (2 * step + 1))
    return 1 / ((warmup + 1) * (2 * warmup + 1) / (6 * warmup) + step - warmup if warmup else step)


class ScheduleFreeStep(torch.optim.Optimizer):
    """Keeps `exp_avg_sq`, the iterate and the average of every parameter; the latter two begin as the parameter. Elementwise."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "warmup": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._one(p, p.grad, group, self.state[p])

    def _one(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg_sq": torch.zeros_like(p)}
            state |= {ITERATE: p.detach().clone(), AVERAGE: p.detach().clone()}
        state["step"] += 1
        step, lr, (towards, decay) = int(state["step"]), group["lr"], group["betas"]
        share, unbiased = weight(step, group["warmup"]), 1 - decay**step
        for y, gradient, square, z, x in pieces(p, grad.reshape(-1), state["exp_avg_sq"], state[ITERATE], state[AVERAGE]):
            square.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
            change = gradient / (square / unbiased).sqrt_().add_(group["eps"])
            z.sub_(change.add_(y, alpha=group["weight_decay"]), alpha=lr)
            x.lerp_(z, share)
            y.copy_(z.lerp(x, towards))
