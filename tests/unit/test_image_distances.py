"""Tests the metrics of generated images against references in fp64 that are written from the papers, and their intervals against
theory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from heliostat.recipes import intervals
from heliostat.recipes.images import distances, neighbors
from scipy.linalg import sqrtm


def sets(n: int = 41, m: int = 60, width: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns fp32 features of generated and of real images."""
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 1.2, (n, width)).astype(np.float32), rng.normal(0, 1, (m, width)).astype(np.float32)


def unbiased(a: np.ndarray, b: np.ndarray, kernel) -> float:
    """Computes Gretton's unbiased estimator (2012, lemma 6), pair by pair."""
    n, m = len(a), len(b)
    own = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own + other - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


@pytest.mark.parametrize("rows", [1024, 10])
def test_kid_is_the_papers_formula_however_its_matrices_are_cut(monkeypatch, rows):
    monkeypatch.setattr(distances, "ROWS", rows)
    a, b = (one.astype(np.float64) for one in sets())
    reference = unbiased(a, b, lambda x, y: (float(x @ y) / 7 + 1) ** 3)
    assert distances.kid(*sets()).value == pytest.approx(reference, rel=1e-9)


def test_cmmd_is_the_papers_formula():
    """Unit vectors, the kernel exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10, times 1000."""
    a, b = ([v / math.sqrt(float(v @ v)) for v in one.astype(np.float64)] for one in sets())
    reference = 1000 * unbiased(a, b, lambda x, y: math.exp(-float((x - y) @ (x - y)) / (2 * 10.0**2)))
    assert distances.cmmd(*sets()).value == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("count", [None, 6])
def test_fid_is_the_papers_formula_also_with_fewer_images_than_features(count):
    a, b = (one[:count].astype(np.float64) for one in sets())
    first, second = np.cov(a.T), np.cov(b.T)
    shift = a.mean(0) - b.mean(0)
    reference = float(shift @ shift + np.trace(first + second - 2 * np.real(sqrtm(first @ second))))
    assert distances.fid(a, b) == pytest.approx(reference, rel=1e-6)
    assert distances.fid_estimate(a, b).value == pytest.approx(reference, rel=1e-6)


def ball(centre: np.ndarray, among: np.ndarray, k: int) -> float:
    """Returns the distance to the k-th nearest other point. The nearest point of `among` is the center itself."""
    return sorted(float(np.linalg.norm(centre - other)) for other in among)[k]


@pytest.mark.parametrize("rows", [1024, 10])
def test_precision_recall_density_and_coverage_are_the_papers_formulas(monkeypatch, rows):
    """Kynkaanniemi et al. 2019, equations 1 and 2, and Naeem et al. 2020, equations 4 and 5."""
    monkeypatch.setattr(neighbors, "ROWS", rows)
    drawn, real = (one.astype(np.float64) for one in sets())

    def reached(centres: np.ndarray, k: int, points: np.ndarray) -> np.ndarray:
        """Returns whether each point is in each center's ball, bool [points, centers]."""
        sizes = [ball(c, centres, k) for c in centres]
        return np.array([[np.linalg.norm(p - c) <= size for c, size in zip(centres, sizes, strict=True)] for p in points])

    in_five = reached(real, 5, drawn)
    reference = {
        "precision": reached(real, 3, drawn).any(1).mean(),
        "recall": reached(drawn, 3, real).any(1).mean(),
        "density": in_five.sum() / (5 * len(drawn)),
        "coverage": in_five.any(0).mean(),
    }
    found = neighbors.manifold(real.astype(np.float32), drawn.astype(np.float32))
    assert {name: one.value for name, one in found.items()} == pytest.approx(reference, rel=1e-9)
    assert 0.2 < reference["precision"] < 1 and 0.2 < reference["recall"] < 1, "the case can tell formulas apart"


def test_scores_with_too_few_images_are_left_out():
    drawn, real = sets(4, 50)
    assert set(neighbors.manifold(real, drawn)) == {"precision", "recall"}
    assert neighbors.manifold(real, drawn[:3]) == {}
    few = distances.kid(drawn[:3], real)
    assert math.isfinite(few.value) and few.low is few.high is None and set(few.named("kid")) == {"kid"}
    assert set(distances.kid(drawn, real).named("kid")) == {"kid", "kid_low", "kid_high"}


def test_the_nearest_training_image_and_the_share_of_memorized_images():
    """Copies count, samples of the same distribution count as often as held-out images, and other images don't count."""
    rng = np.random.default_rng(0)
    training, held_out, fresh, far = (rng.normal(m, 1, (n, 6)) for m, n in ((0, 900), (0, 400), (0, 400), (4, 100)))
    copies = training[:100] + rng.normal(0, 1e-3, (100, 6))
    found = neighbors.nearest(copies, training)
    assert found.index.tolist() == list(range(100)) and found.distance.max() < 0.01
    plain = [min(float(np.linalg.norm(x - t)) for t in training) for x in held_out[:20]]
    assert neighbors.nearest(held_out[:20], training).distance.tolist() == pytest.approx(plain, rel=1e-6)
    limit = neighbors.nearest(held_out, training).distance

    def share(images: np.ndarray) -> intervals.Estimate:
        return neighbors.memorized(neighbors.nearest(images, training).distance, limit)

    assert share(copies).value == 1 and share(far).value == 0 and share(fresh).low <= 0.05 <= share(fresh).high
    half = share(np.concatenate([copies, far]))
    assert half.value == 0.5 and 0.4 < half.low < half.high < 0.6


# intervals -----------------------------------------------------------------------------------------------------------


def test_halves_are_different_halves_and_the_same_ones_again():
    drawn = intervals.halves(9, seed=3)
    assert drawn.shape == (20, 9) and set(drawn.sum(1)) == {4} and len({row.tobytes() for row in drawn}) > 10
    assert (drawn == intervals.halves(9, seed=3)).all() and (drawn != intervals.halves(9, seed=4)).any()


def test_an_interval_of_mmd_contains_the_true_value_about_as_often_as_it_says():
    """For normal distributions, the kernel's expectation is known in closed form (the integral of a product of Gaussians)."""
    width, shift = 4, 1.0
    scale = (1 + 2 / distances.SIGMA**2) ** (-width / 2)
    true = 2 * scale - 2 * scale * math.exp(-(shift**2) / (2 * (distances.SIGMA**2 + 2)))
    rng, hits, values = np.random.default_rng(1), 0, []
    for _ in range(150):
        a, b = rng.normal(0, 1, (60, width)), rng.normal(0, 1, (90, width))
        a[:, 0] += shift
        one = distances.RealSide(b, distances.gaussian).mmd(a)
        hits += one.low <= true <= one.high
        values.append(one.value)
    assert 0.87 * 150 <= hits <= 150, hits
    assert np.mean(values) == pytest.approx(true, abs=4 * np.std(values) / math.sqrt(150)), "the estimator is unbiased"


def test_half_samples_estimate_the_standard_error_of_a_mean():
    """The delete-half jackknife is exact for means on average."""
    rng = np.random.default_rng(2)
    ratios = []
    for _ in range(100):
        values = rng.normal(0, 2, 80)
        each = np.array([values[half].mean() for half in intervals.halves(80, 0)])
        one = intervals.of_halves(float(values.mean()), each)
        ratios.append((one.high - one.low) / (2 * intervals.Z * 2 / math.sqrt(80)))
    assert np.mean(ratios) == pytest.approx(1, abs=0.06)


def test_fid_is_biased_and_kid_is_not_at_few_images():
    """Why FID with few images is left out: of one distribution, FID at 40 images is far above FID at 400, and KID isn't."""
    rng = np.random.default_rng(3)
    real = rng.normal(0, 1, (800, 16))
    pairs = [(rng.normal(0, 1, (40, 16)), rng.normal(0, 1, (400, 16))) for _ in range(10)]
    few, many = (np.mean([distances.fid(pair[i], real) for pair in pairs]) for i in (0, 1))
    assert few > 5 * many > 0
    small = [distances.kid(a, real).value for a, _ in pairs]
    assert abs(np.mean(small)) < 3 * np.std(small) / math.sqrt(10) + 1e-3


def test_shares_and_means_have_their_usual_intervals():
    hits = np.arange(100) < 30
    assert intervals.share(hits) == (0.3, *intervals.wilson(0.3, 100))
    one = intervals.mean(np.array([1.0, 2.0, 3.0, 4.0]))
    assert one.value == 2.5 and one.high - one.value == pytest.approx(intervals.Z * math.sqrt(5 / 3) / 2)
    assert intervals.mean(np.array([7.0])) == (7.0, None, None)
    assert all(low < high for low, high in itertools.pairwise([0, *intervals.wilson(0.5, 10), 1]))
