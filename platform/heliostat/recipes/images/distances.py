"""Measures the distance between two sets of image features: FID, KID, and CMMD, each with a 95 % interval.

FID: the Frechet distance between normal distributions fitted to the features (Heusel et al. 2017, arXiv 1706.08500). For few
images, FID is biased.

KID and CMMD: the unbiased squared maximum mean discrepancy. KID has the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv
1801.01401). CMMD has the kernel exp(-|x - y|^2 / 200) on features of length 1, and is multiplied by 1000 (Jayasumana et al.
2024, arXiv 2401.09603). The paper's program uses the biased estimator, which differs by O(1 / n).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from heliostat.recipes import intervals
from heliostat.recipes.intervals import Estimate

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # fp64 features [n, d] and [m, d] -> kernel values [n, m]
Progressed = Callable[[], None]
ROWS = 1024  # rows of the kernel matrix that are computed at a time
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
FID_HALVES = 10  # each half takes two QR decompositions and singular values
LEAST = 4  # images of an interval, so that each half has two


def polynomial(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    return np.exp(-squares.clip(min=0) / (2 * SIGMA**2))


def of_length_one(features: np.ndarray) -> np.ndarray:
    """Scales features [n, d] to length 1, in fp64."""
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)


class RealSide:
    """Contains the real side of a squared maximum mean discrepancy (MMD), which is the same in every evaluation."""

    def __init__(self, features: np.ndarray, kernel: Kernel, progressed: Progressed = lambda: None) -> None:
        """Averages the kernel over all pairs of two different real images. `features`: [n, d] of at least two images."""
        self.features, self.kernel = features.astype(np.float64), kernel
        self.weights = _weights(len(features), seed=0)
        self.within = _within(self.features, self.weights, kernel, progressed)

    def mmd(self, drawn: np.ndarray, progressed: Progressed = lambda: None) -> Estimate:
        """Estimates the unbiased squared MMD between the real images and generated images, features [m, d] of at least two
        images."""
        drawn = drawn.astype(np.float64)
        weights = _weights(len(drawn), seed=1)
        across = _sums(drawn, self.features, weights, self.weights, self.kernel, progressed)
        pairs = weights.sum(0) * self.weights.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):  # halves of fewer than two images have no pairs, and aren't used
            each = _within(drawn, weights, self.kernel, progressed) + self.within - 2 * across / pairs
        if min(len(drawn), len(self.features)) < LEAST:
            return Estimate(float(each[0]))
        return intervals.of_halves(float(each[0]), each[1:])


def kid(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Estimates the KID of features [n, d] and [m, d]."""
    return RealSide(b, polynomial).mmd(a)


def cmmd(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Estimates the CMMD of CLIP embeddings [n, d] and [m, d]. Scales the embeddings to length 1."""
    return scaled(RealSide(of_length_one(b), gaussian).mmd(of_length_one(a)))


def scaled(mmd: Estimate) -> Estimate:
    """Multiplies an MMD and its bounds by 1000, as CMMD does."""
    if mmd.low is None or mmd.high is None:
        return Estimate(SCALE * mmd.value)
    return Estimate(SCALE * mmd.value, SCALE * mmd.low, SCALE * mmd.high)


def _weights(count: int, seed: int) -> np.ndarray:
    """Selects the images of each estimate, as 0 or 1, fp64 [count, 1 + halves]: first all images, then random halves."""
    return np.vstack([np.ones((1, count), dtype=bool), intervals.halves(count, seed)]).T.astype(np.float64)


def _within(features: np.ndarray, weights: np.ndarray, kernel: Kernel, progressed: Progressed) -> np.ndarray:
    """Averages the kernel over the pairs of different images, for each selection of images, fp64 [selections]."""
    own = np.concatenate([kernel(one[None], one[None])[0] for one in features])
    counts = weights.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (_sums(features, features, weights, weights, kernel, progressed) - own @ weights) / (counts * (counts - 1))


def _sums(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray, kernel: Kernel, progressed: Progressed) -> np.ndarray:
    """Sums the kernel over all pairs of an image in `a` and an image in `b`, for each selection of images, fp64 [selections].
    Computes each kernel value once for all selections."""
    total = np.zeros(of_a.shape[1])
    for first in range(0, len(a), ROWS):
        total += ((kernel(a[first : first + ROWS], b) @ of_b) * of_a[first : first + ROWS]).sum(0)
        progressed()
    return total


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the FID of features [n, d] and [m, d].

    The trace of the root of the product of both covariances is the sum of the singular values of `a` times `b` transposed, if
    both are centered and scaled. Triangular factors have the same singular values, and at most d rows.
    """
    (mean_a, spread_a, factor_a), (mean_b, spread_b, factor_b) = _fitted(a), _fitted(b)
    crossed = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    shift = mean_a - mean_b
    return float(shift @ shift + spread_a + spread_b - 2 * crossed)


def _fitted(features: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Fits a normal distribution to features [n, d]. Returns its mean [d], the trace of its covariance, and a triangular factor F
    [min(n, d), d] of the covariance (F transposed times F), fp64."""
    mean = features.mean(0, dtype=np.float64)
    scaled = (features - mean) / np.sqrt(len(features) - 1)
    factor: np.ndarray = np.linalg.qr(scaled, mode="r")  # type: ignore[assignment]  # with this mode, no tuple
    return mean, float(np.square(scaled).sum()), factor


def fid_estimate(a: np.ndarray, b: np.ndarray, progressed: Progressed = lambda: None) -> Estimate:
    """Estimates the FID of features [n, d] and [m, d]. The interval doesn't include the bias."""
    if min(len(a), len(b)) < LEAST:
        return Estimate(fid(a, b))
    each = []
    for one, other in zip(intervals.halves(len(a), 1, FID_HALVES), intervals.halves(len(b), 0, FID_HALVES), strict=True):
        each.append(fid(a[one], b[other]))
        progressed()
    return intervals.of_halves(fid(a, b), np.array(each))
