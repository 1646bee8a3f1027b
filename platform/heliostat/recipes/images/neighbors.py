"""Compares sets of image features by nearest neighbors: precision, recall, density, coverage, and memorization.

A set's manifold is the union of balls around its images. The radius of a ball is the distance to the image's k-th nearest
neighbor in the set. Precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991, with k = 3. Density and coverage: Naeem et
al. 2020, arXiv 2002.09797, with k = 5.

Memorization: the distance from each image to its nearest training image. Like Meehan et al. 2020 (arXiv 2004.05675), compares
this distance of generated images with the same distance of held-out images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from heliostat.recipes import intervals
from heliostat.recipes.intervals import Estimate

K_PRECISION, K_DENSITY = 3, 5
CLOSE = 0.05  # share of held-out images that are closer to a training image than the limit for memorized images
ROWS = 1024  # rows of the distance matrix that are computed at a time
Progressed = Callable[[], None]


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes the squared distances between features [n, d] and [m, d], fp64 [n, m]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)).clip(min=0)


def radii(features: np.ndarray, k: int, progressed: Progressed = lambda: None) -> np.ndarray:
    """Computes the squared distance of each image to its k-th nearest other image, fp64 [n]. Needs more than `k` images."""
    out = np.empty(len(features))
    for first in range(0, len(features), ROWS):
        squares = _squares(features[first : first + ROWS], features)
        squares[np.arange(len(squares)), first + np.arange(len(squares))] = np.inf  # an image isn't its own neighbor
        out[first : first + ROWS] = np.partition(squares, k - 1, axis=1)[:, k - 1]
        progressed()
    return out


def manifold(real: np.ndarray, drawn: np.ndarray, progressed: Progressed = lambda: None) -> dict[str, Estimate]:
    """Estimates precision, recall, density, and coverage of generated images. Leaves out scores for which there are too few
    images: these scores need more than k images of each kind.

    The intervals regard the manifold as fixed.
    """
    out: dict[str, Estimate] = {}
    least = min(len(real), len(drawn))
    if least > K_PRECISION:
        of_real, of_drawn = (radii(one, K_PRECISION, progressed) for one in (real, drawn))
        inside, covered = np.empty(len(drawn), dtype=bool), np.zeros(len(real), dtype=bool)
        for rows in _slices(len(drawn)):
            squares = _squares(drawn[rows], real)
            inside[rows] = (squares <= of_real).any(1)
            covered |= (squares <= of_drawn[rows, None]).any(0)
            progressed()
        out |= {"precision": intervals.share(inside), "recall": intervals.share(covered)}
    if least > K_DENSITY:
        limits = radii(real, K_DENSITY, progressed)
        balls, reached = np.empty(len(drawn)), np.zeros(len(real), dtype=bool)
        for rows in _slices(len(drawn)):
            within = _squares(drawn[rows], real) <= limits
            balls[rows] = within.sum(1)
            reached |= within.any(0)
            progressed()
        out |= {"density": intervals.mean(balls / K_DENSITY), "coverage": intervals.share(reached)}
    return out


@dataclass(frozen=True)
class Nearest:
    """Contains the nearest training image of each image: its distance, fp64 [n], and its index, int64 [n]."""

    distance: np.ndarray
    index: np.ndarray


def nearest(images: np.ndarray, training: np.ndarray, progressed: Progressed = lambda: None) -> Nearest:
    """Finds the nearest training image of each image, by features [n, d] and [m, d]."""
    distance, index = np.empty(len(images)), np.empty(len(images), dtype=np.int64)
    for rows in _slices(len(images)):
        squares = _squares(images[rows], training)
        index[rows] = squares.argmin(1)
        distance[rows] = np.sqrt(squares.min(1))
        progressed()
    return Nearest(distance, index)


def memorized(drawn: np.ndarray, held_out: np.ndarray) -> Estimate:
    """Estimates the share of generated images that are closer to a training image than 95 % of the held-out images are.

    A model that copies nothing has a share of about 0.05 or less. `drawn`, `held_out`: distances to the nearest training image.
    """
    return intervals.share(drawn <= np.quantile(held_out, CLOSE))


def _slices(count: int) -> list[slice]:
    return [slice(first, min(first + ROWS, count)) for first in range(0, count, ROWS)]
