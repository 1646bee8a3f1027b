"""Updates by the sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

from typing import Any

import torch

from heliostat.optim.pieces import pieces


class LionStep(torch.optim.Optimizer):
    """Keeps `exp_avg` of every parameter; elementwise."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._one(p, p.grad, group, self.state[p])

    def _one(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
        state["step"] += 1
        (now, later), lr = group["betas"], group["lr"]
        p.mul_(1 - lr * group["weight_decay"])
        for part, gradient, average in pieces(p, grad.reshape(-1), state["exp_avg"]):
            part.add_(average.lerp(gradient, 1 - now).sign_(), alpha=-lr)
            average.lerp_(gradient, 1 - later)
