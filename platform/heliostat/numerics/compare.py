"""Compares the engine's results with those of one plain process. All functions on tensors are pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Tensors = Mapping[str, torch.Tensor]
EXPLAINED = 0.1  # a cause explains a difference if at most this share is left


def relative(value: torch.Tensor, right: torch.Tensor, floor: float = 0.0) -> float:
    """Computes the relative difference: the norm of `value` - `right`, divided by the norm of `right` or by `floor`, whichever is
    larger. Returns infinity for NaN."""
    difference, base = float((value - right).norm()), max(float(right.norm()), floor)
    if difference == 0.0:
        return 0.0
    return difference / base if base and difference == difference else float("inf")


def floors(gradients: Tensors, share: float) -> dict[str, float]:
    """Computes a lower limit of the norm by which a gradient's difference is divided, for each parameter.

    The limit is `share` of the norm that the parameter's gradient would have if all elements of the complete gradient were
    equally large.
    """
    size = sum(g.numel() for g in gradients.values())
    mean = (sum(float(g.square().sum()) for g in gradients.values()) / max(1, size)) ** 0.5
    return {name: share * mean * g.numel() ** 0.5 for name, g in gradients.items()}


def explain_gradient(
    value: torch.Tensor, right: torch.Tensor, parts: Sequence[torch.Tensor], before: torch.Tensor | None, limit: float
) -> str:
    """Finds the cause of a wrong gradient. Returns an empty string if the cause is unknown.

    `parts`: each worker's share of the right gradient. `before`: the right gradient of the previous step. `limit`: the relative
    difference that rounding explains.
    """
    size = float(value.norm())
    if not size:
        return "is zero: the parameter gets no gradient"
    tolerance = max(limit, EXPLAINED) * size
    ratio = _ratio(value, right)
    if float((value - ratio * right).norm()) <= limit * size:
        return f"is {ratio:.4g} times the right gradient: a wrong scale"
    for scale in (1.0, float(len(parts))):
        apart = torch.stack([(value - scale * part).abs() for part in parts]).amin(0)
        if float(apart.norm()) <= tolerance:
            return "is one worker's share: the gradient wasn't reduced over the workers"
    if before is not None:
        if float((value - _ratio(value, before) * before).norm()) <= tolerance:
            return "is the gradient of the previous step: a stale buffer"
        rest = value - right
        if float((rest - _ratio(rest, before) * before).norm()) <= tolerance:
            return "includes the gradient of the previous step: a stale buffer, not cleared"
    return ""


def explain_update(value: torch.Tensor, right: torch.Tensor, limit: float) -> str:
    """Finds the cause of a wrong update. Returns an empty string if the cause is unknown."""
    size = float(value.norm())
    if not size:
        return "the weights didn't change"
    ratio = _ratio(value, right)
    if float((value - ratio * right).norm()) <= max(limit, EXPLAINED) * size:
        return f"is {ratio:.4g} times the right update: a wrong scale"
    return ""


def _ratio(value: torch.Tensor, right: torch.Tensor) -> float:
    """Computes the factor r for which r * `right` is closest to `value`, by least squares."""
    return float((value * right).sum()) / max(float(right.square().sum()), 1e-300)
