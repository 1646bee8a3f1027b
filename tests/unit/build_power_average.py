"""Computes power-function averages by the formulas of arXiv 2312.02696, in fp64, as a reference for tests."""

from __future__ import annotations

import numpy as np


def width(exponent: float) -> float:
    """Returns the length of an average: equation (3) of the paper, as the variance of the profile s^g on [0, 1]."""
    mean, square = (exponent + 1) / (exponent + 2), (exponent + 1) / (exponent + 3)
    return (square - mean**2) ** 0.5


def exponent(length: float) -> float:
    """Returns the exponent of an average of a length, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > length else (low, middle)
    return low


def profile(length: float, steps: int) -> np.ndarray:
    """Returns the weight of each step in the average after `steps` steps: the integral of the profile over (s - 1, s]."""
    bounds = (np.arange(steps + 1) / steps) ** (exponent(length) + 1)
    return np.diff(bounds)
