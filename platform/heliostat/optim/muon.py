"""Implements Muon: moves hidden matrices along their orthogonalized momentum (Jordan et al. 2024). AdamW updates everything else.

The momentum is elementwise, so each worker keeps the momentum of its own ZeRO slices. Orthogonalization needs complete matrices.
The workers assemble complete matrices once per step, after clipping (`whole_matrices`). DeepSpeed's own Muon orthogonalizes
before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NotRequired, TypedDict, cast

import torch

from heliostat.optim.matrix_shapes import sides
from heliostat.optim.whole_matrices import Matrix, on_whole


class AdamWKeys(TypedDict):
    """Contains the hyperparameters for the parameters that AdamW updates."""

    lr: float
    betas: tuple[float, float]
    eps: float


class MuonKeys(TypedDict):
    """Contains the hyperparameters for hidden matrices. A parameter group also has its `weight_decay`."""

    lr: float
    momentum: float
    nesterov: bool
    dtype: torch.dtype
    like_adamw: bool
    weight_decay: NotRequired[float]


class WithAdamW(torch.optim.Optimizer):
    """Updates `orthogonal` groups by Muon, with the state `momentum_buffer`. Updates the other groups by AdamW, with the states
    `exp_avg` and `exp_avg_sq`.

    The class name doesn't contain "Muon", because DeepSpeed has special code for optimizers with "Muon" in the name.
    """

    def __init__(self, groups: list[dict[str, object]], adamw: AdamWKeys, muon: MuonKeys) -> None:
        # AdamW adds its own defaults to its groups, in place
        self.adamw = torch.optim.AdamW(
            [g for g in groups if not g["orthogonal"]] or [{"params": [torch.zeros(1)]}], **adamw, fused=True
        )
        super().__init__(groups, {**muon, "weight_decay": 0.0, "fused": True})
        self.adamw.state = self.state
        self.cut: dict[torch.Tensor, list[Matrix]] = {}
        self.device = torch.device("cpu")

    def cut_as(self, cut: dict[torch.Tensor, list[Matrix]], device: torch.device) -> None:
        """Records which slices of which matrices each flat tensor contains, and the device on which the workers compute."""
        self.cut, self.device = cut, device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.adamw.param_groups = [g for g in self.param_groups if not g["orthogonal"]]
        self.adamw.step()
        for group in self.param_groups:
            for p in group["params"] if group["orthogonal"] else []:
                if p.grad is not None:
                    self._one(p, p.grad, cast(MuonKeys, group))

    def _one(self, p: torch.Tensor, grad: torch.Tensor, group: MuonKeys) -> None:
        state, lr = self.state[p], group["lr"]
        if not state:
            state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        change = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()

        def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
            rows, columns = matrix.shape
            return newton_schulz(matrix, group["dtype"]).to(matrix.dtype) * rate_scale(rows, columns, group["like_adamw"])

        if p in self.cut:
            on_whole(orthogonal, change, self.cut[p], self.device)
        else:  # complete: a single process, or ZeRO stage 0
            whole = change.view(*sides(tuple(p.shape)))
            for i, matrix in enumerate(whole):
                whole[i] = orthogonal(matrix)
        p.mul_(1 - lr * group["weight_decay"]).add_(change.view(p.shape), alpha=-lr)


QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: the steepest polynomial at 0 that stays within about 0.7 to 1.2
STEPS = 5
SMALLEST = 1e-7


def newton_schulz(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Orthogonalizes a matrix [rows, columns] by Newton-Schulz iterations in `dtype` (Jordan et al. 2024, Muon). Returns the
    result in `dtype`."""
    a, b, c = QUINTIC
    wide = matrix.to(dtype)
    tall = matrix.shape[0] > matrix.shape[1]
    wide = wide.T if tall else wide
    wide = wide / wide.norm().clamp(min=SMALLEST)
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


def rate_scale(rows: int, columns: int, like_adamw: bool) -> float:
    """Computes the factor of the learning rate for a matrix of this shape.

    `like_adamw`: the update gets the root mean square of AdamW's updates (Liu et al. 2025, arXiv 2502.16982). Otherwise, the
    update gets a spectral norm that suits the shape, as in Muon's publication.
    """
    return 0.2 * math.sqrt(max(rows, columns)) if like_adamw else math.sqrt(max(1.0, rows / columns))
