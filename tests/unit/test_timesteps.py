"""Tests the times of flow matching: their densities, and the shift by image size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from heliostat.recipes.counter_random import uniform, words
from heliostat.recipes.images.noising import NoiseObjective, Process
from heliostat.schema import validate

COUNT = 40_000


def process(**keys: Any) -> Process:
    return Process(validate(NoiseObjective, {"prediction": "flow", **keys}, "objective"))


def logit_normal(s: np.ndarray, mean: float, std: float) -> np.ndarray:
    logit = np.log(s / (1 - s))
    return np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * s * (1 - s))


def shifted(density: Callable[[np.ndarray], np.ndarray], shift: float) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the density of a s / (1 + (a - 1) s), if s has this density."""
    return lambda t: density(t / (shift - (shift - 1) * t)) * shift / (shift - (shift - 1) * t) ** 2


DENSITIES: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = {
    "uniform": ({}, np.ones_like),
    "shift": ({"shift": 3.0}, shifted(np.ones_like, 3.0)),
    "logit-normal": ({"timesteps": "logit_normal"}, lambda s: logit_normal(s, 0.0, 1.0)),
    "logit-normal, moved": (
        {"timesteps": "logit_normal", "timestep_mean": 0.8, "timestep_std": 0.6}, lambda s: logit_normal(s, 0.8, 0.6)
    ),
    "logit-normal, shifted": ({"timesteps": "logit_normal", "shift": 2.5}, shifted(lambda s: logit_normal(s, 0.0, 1.0), 2.5)),
}  # fmt: skip


@pytest.mark.parametrize("law", DENSITIES)
def test_times_have_the_density_of_their_law(law):
    """By Kolmogorov and Smirnov: for 40,000 times, the largest distance to the distribution is below the bound of 1 in 10,000.
    Each of the 20 bins has its share of the times within 5 standard deviations."""
    keys, density = DENSITIES[law]
    drawn = uniform(words(3, torch.arange(COUNT // 4), 0, 4)).flatten()
    times = np.sort(process(**keys).times(drawn).double().numpy())
    assert times[0] >= 0 and times[-1] <= 1
    grid = np.linspace(1e-6, 1 - 1e-6, 400_001)
    values = density(grid)
    total = np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) / 2) * (grid[1] - grid[0])])
    assert total[-1] == pytest.approx(1.0, abs=2e-4), "the density of the test is one"
    expected = np.interp(times, grid, total)
    distance = max(np.abs(expected - np.arange(COUNT) / COUNT).max(), np.abs(expected - np.arange(1, COUNT + 1) / COUNT).max())
    assert distance < 2.23 / math.sqrt(COUNT)
    counts, shares = np.histogram(times, 20, (0, 1))[0], np.diff(np.interp(np.linspace(0, 1, 21), grid, total))
    assert (np.abs(counts - COUNT * shares) < 5 * np.sqrt(COUNT * shares) + 1).all()


@pytest.mark.parametrize("law", DENSITIES)
def test_times_grow_with_the_uniform_number(law):
    """Held-out scores of the quarters depend on this: the first quarter has the least noise."""
    assert (process(**DENSITIES[law][0]).times((torch.arange(2000) + 0.5) / 2000).diff() > 0).all()


def test_the_automatic_shift_is_the_root_of_the_ratio_of_the_positions():
    """As in the paper's equation 23, in fp64. Without a change of size, times aren't shifted."""
    auto, u = process(shift="auto", base_size=16), (torch.arange(1000) + 0.5) / 1000
    for height, width in ((16, 16), (32, 32), (16, 64), (48, 24)):
        shift = math.sqrt(height * width / 16**2)
        expected = shift * u.double() / (1 + (shift - 1) * u.double())
        assert torch.allclose(auto.times(u, (height, width)).double(), expected, atol=1e-6)
    assert torch.equal(auto.times(u, (16, 16)), process().times(u))


def test_the_sampler_has_the_shift_of_the_images_size():
    """The pipeline samples at even times from 1 to 1/1000, shifted as in training."""
    from heliostat.recipes.images.pipeline import Guidance, denoise, generators

    def times(made: Process, side: int) -> list[float]:
        drawn: list[float] = []

        def predictor(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            drawn.append(float(t[0]))
            return torch.zeros_like(noisy)

        denoise(predictor, made.scheduler("euler"), (1, 1, side, side), 10, Guidance(1.0), generators([0]), "cpu")
        return drawn

    auto, even = process(shift="auto", base_size=8), np.linspace(1, 0.001, 10)
    for side in (8, 24):
        a = side / 8
        assert times(auto, side) == pytest.approx(1000 * a * even / (1 + (a - 1) * even), rel=1e-5)
