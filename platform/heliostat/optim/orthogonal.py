"""Orthogonalizes matrices: replaces a matrix by the nearest one whose singular values are about 1."""

from __future__ import annotations

import math

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: the steepest at 0 that stays within about 0.7 to 1.2
STEPS = 5
SMALLEST = 1e-7


def newton_schulz(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Orthogonalizes a matrix by Newton-Schulz iterations, computed in `dtype` (Jordan et al. 2024, Muon)."""
    a, b, c = QUINTIC
    wide = matrix.to(dtype)
    tall = matrix.shape[0] > matrix.shape[1]
    wide = wide.T if tall else wide
    wide = wide / wide.norm().clamp(min=SMALLEST)
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


def scale(rows: int, columns: int, like_adamw: bool) -> float:
    """Computes by what the learning rate is multiplied for a shape: so that the change has the root mean square of AdamW's (Liu
    et al. 2025, arXiv 2502.16982), or a spectral norm that suits the shape, as Muon was published."""
    return 0.2 * math.sqrt(max(rows, columns)) if like_adamw else math.sqrt(max(1.0, rows / columns))
