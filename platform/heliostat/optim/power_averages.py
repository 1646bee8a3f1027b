"""Averages weights with a power function, and combines such averages into an average of another length after training (Karras et
al. 2023, "Analyzing and improving the training dynamics of diffusion models", arXiv 2312.02696, section 3).

After step t, the average with exponent g weights the weights of step s by s^g, up to a constant. Its length is the standard
deviation of this profile, relative to t: 0.05 means that the profile is about 5 % of the run wide. A profile forgets the initial
weights, and keeps its relative width as the run grows.

The weights of a step count for the interval (s - 1, s]. So the update with `rate` computes exactly the integral of the profile.
All functions compute in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHORTEST, LONGEST = 0.005, 0.28  # lengths of averages; a plain mean over the run has length 0.2887


@dataclass(frozen=True)
class PowerProfile:
    """Describes an average: its `length`, and the number of optimizer steps (`step`) after which it was taken."""

    length: float
    step: int


def kind(length: float) -> str:
    """Returns the prefix of the tensors of an average in checkpoints, for example `ema-050` for a length of 0.05."""
    return f"ema-{round(length * 1000):03d}"


def exponent(length: float) -> float:
    """Computes the exponent g of the average with a length: the positive root of (g + 1) = length^2 (g + 2)^2 (g + 3)."""
    ratio = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - ratio, 12.0 - ratio]).real.max())


def rate(exponent: float, step: int) -> float:
    """Computes the factor by which the average moves toward the weights after a step, counted from 1. The factor of step 1 is
    1."""
    return 1.0 - (1.0 - 1.0 / step) ** (exponent + 1.0)


def combination(known: Sequence[PowerProfile], wanted: PowerProfile) -> tuple[np.ndarray, float]:
    """Computes the factors of known averages whose sum is nearest to the wanted average, by least squares over the profiles.

    Returns the factors, fp64 [known], and the error: the norm of the difference of the profiles, relative to the norm of the
    wanted profile.
    """
    products = np.array([[_product(a, b) for b in known] for a in known])
    target = np.array([_product(a, wanted) for a in known])
    norms = np.sqrt(np.diag(products))  # equal scales improve the condition of the equations
    factors = np.linalg.lstsq(products / np.outer(norms, norms), target / norms)[0] / norms
    whole = _product(wanted, wanted)
    missed = whole - 2 * factors @ target + factors @ products @ factors
    return factors, float(np.sqrt(max(0.0, missed) / whole))


def _product(a: PowerProfile, b: PowerProfile) -> float:
    """Computes the integral of the product of two profiles. A profile is (g + 1) s^g / t^(g + 1) for s in (0, t]."""
    first, second = exponent(a.length), exponent(b.length)
    shorter = min(a.step, b.step)
    inside = (shorter / a.step) ** (first + 1) * (shorter / b.step) ** (second + 1) / shorter
    return (first + 1) * (second + 1) / (first + second + 1) * inside
