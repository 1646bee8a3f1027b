"""Estimates properties of a whole input from a sample: shares with confidence intervals, and the number of duplicates. A sample
contains fewer duplicates than its share of the input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

Z = 1.96  # for 95 %
ROUNDS = 30  # rounds of expectation maximization, divided by the sample's share: the smaller the share, the slower they converge
MOST_ROUNDS = 10_000
SHOWN = 40  # a cluster with more documents in the sample has a well-known size: within a third


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Computes the 95 % confidence interval (Wilson 1927) of a share, from `hits` hits in `count` trials."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, Z * Z
    centre, spread = share + z2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z2 / count)), min(1.0, (centre + spread) / (1 + z2 / count))


def enough(fraction: float, spread: float, within: float) -> float:
    """Computes the share of the input that a sample needs for a given precision. With this share, the estimate of a sum has a
    relative error of at most `within` (95 % confidence). `spread` is the relative standard error of a sample that has the share
    `fraction` of the input. For a share f, the error is proportional to the square root of (1 - f) / f."""
    needed = (within / Z) ** 2
    constant = spread * spread * fraction / (1 - fraction)
    return constant / (constant + needed)


@dataclass(frozen=True)
class DuplicateShare:
    """Holds the share of documents that are dropped as duplicates: in the sample, and expected in the whole input, with
    bounds."""

    seen: float
    expected: float
    low: float
    high: float


def duplicates(documents: int, sizes: dict[int, int], times: float) -> DuplicateShare:
    """Estimates the share of duplicates in a whole input that has `times` times as many documents as the sample. `sizes` maps
    each size of a cluster in the sample (2 or more) to the number of clusters with this size.

    A sample with share f contains both documents of a pair with probability f squared. So the sample's share of duplicates is too
    low. The expected value comes from the cluster sizes that make the sample's sizes likely (`whole_sizes`), within the bounds.
    In small samples, the expected value depends mostly on the starting point of this search. The lower bound is the sample's
    share. The upper bound assumes that all clusters are pairs. It is the largest number of pairs (95 % of a Poisson variable),
    divided by f squared. Chao and Lin's lower bound of distinct documents (2012) limits the upper bound.
    """
    clusters, duplicate_documents = sum(sizes.values()), sum(size * number for size, number in sizes.items())
    dropped, single = duplicate_documents - clusters, documents - duplicate_documents
    seen = dropped / documents if documents else 0.0
    if times <= 1 or not documents:
        return DuplicateShare(seen, seen, seen, seen)
    pairs = sum(size * (size - 1) / 2 * number for size, number in sizes.items())
    many = (pairs + 1) * (1 - 1 / (9 * (pairs + 1)) + Z / (3 * math.sqrt(pairs + 1))) ** 3  # Byar's approximation
    high = max(seen, _most(documents, dropped, single, many, max(many, clusters), times))
    distinct, whole = whole_sizes({1: single, **sizes}, 1 / times)
    return DuplicateShare(seen, min(max(seen, 1 - distinct / whole), high), seen, high)


def duplicates_by_place(
    documents: int, groups: dict[int, int], places: dict[int, int], rate: float, times: float
) -> DuplicateShare:
    """Estimates the share of duplicates in a whole input that has `times` times as many documents as the sample. The sample chose
    places, such as ranges of a file, and then a share `rate` of the documents in each place.

    `groups` maps the number of documents that a cluster has in one place (2 or more) to how often this number occurs. `places`
    maps the number of places in which a cluster has documents (2 or more) to how often this number occurs. Neighbors are often
    similar, for example pages of a site. If a place is in the sample, the sample has a share `rate` of its documents, so the
    chance to have both documents of a pair in this place depends only on `rate`. If the documents of a pair are in two places,
    both places must be in the sample. The probability of this is the square of one place's probability. So the estimate within
    places uses `rate`. The documents that remain in a place count as independent, and give the estimate across places. The bounds
    of both estimates are multiplied. The bounds within places also include the sampling error of the places (`wilson`).
    """
    dropped = sum((size - 1) * number for size, number in groups.items())
    within, left, (least, most) = duplicates(documents, groups, 1 / rate), documents - dropped, wilson(dropped, documents)
    if dropped:
        within = replace(within, low=min(within.low, least), high=max(within.high, most))
    across = duplicates(left, places, times)
    return DuplicateShare(
        *(1 - (1 - getattr(within, name)) * (1 - getattr(across, name)) for name in ("seen", "expected", "low", "high"))
    )


def whole_sizes(sizes: dict[int, int], share: float) -> tuple[float, float]:
    """Estimates the number of clusters in the whole input, and of the documents in them. `sizes` maps the number of documents
    that a cluster has in the sample (1 or more) to the number of clusters with this number.

    The sample contains m of a cluster's k documents with the binomial probability. Expectation maximization approaches the most
    likely mixture of cluster sizes. The algorithm starts with few large clusters, and stops early, because late rounds fit noise.
    If the sample has many documents of a cluster, the cluster's size is this number divided by the sample's share.
    """
    known = {m: n for m, n in sizes.items() if n and m > SHOWN}
    seen = {m: n for m, n in sizes.items() if n and m <= SHOWN}
    clusters, documents = float(sum(known.values())), sum(m * n for m, n in known.items()) / share
    if not seen:
        return clusters, documents
    grid = _grid(2 * max(seen) / share)
    shown, counts = np.array(sorted(seen)), np.array([float(seen[m]) for m in sorted(seen)])
    seen_share = -np.expm1(grid * math.log1p(-share))
    likely = np.array([[_binomial(int(k), int(m), share) for k in grid] for m in shown]) / seen_share
    weights = seen_share / grid.astype(np.float64) ** 2
    weights /= weights.sum()
    for _ in range(min(MOST_ROUNDS, math.ceil(ROUNDS / share))):
        weights = weights * (likely.T @ (counts / (likely @ weights))) / counts.sum()
    estimated = counts.sum() * weights / seen_share
    return clusters + float(estimated.sum()), documents + float((estimated * grid).sum())


def _grid(most: float) -> np.ndarray:
    """Lists cluster sizes up to about `most`: 1 to 8, then each size is a third larger than the previous size."""
    sizes = list(range(1, 9))
    while sizes[-1] < most:
        sizes.append(sizes[-1] * 4 // 3)
    return np.array(sizes)


def _binomial(count: int, hits: int, share: float) -> float:
    if hits > count:
        return 0.0
    ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return math.exp(ways + hits * math.log(share) + (count - hits) * math.log1p(-share))


def _most(documents: int, dropped: int, single: int, pairs: float, clusters: float, times: float) -> float:
    by_pairs = pairs * times / documents
    grown = 2 * clusters * documents / max(1, documents - 1) + single / (times - 1)
    distinct = documents - dropped + (single * single / grown if grown else 0.0)
    return max(0.0, min(1.0, by_pairs, 1 - distinct / (documents * times)))
