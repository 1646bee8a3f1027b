"""Estimates properties of a whole input from a sample: shares with intervals, and duplicates, of which a sample shows few."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

Z = 1.96  # for 95 %
ROUNDS = 300
SHOWN = 40  # documents of a cluster in the sample, which show its size within a third


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Computes the 95 % interval (Wilson 1927) of a share, from `hits` of `count`."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, Z * Z
    centre, spread = share + z2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z2 / count)), min(1.0, (centre + spread) / (1 + z2 / count))


def enough(fraction: float, spread: float, within: float) -> float:
    """Computes the share of the input that would estimate a sum to `within` of it (95 %), if this share has the standard error
    `spread`. The error falls with the square root of (1 - f) / f."""
    needed = (within / Z) ** 2
    constant = spread * spread * fraction / (1 - fraction)
    return constant / (constant + needed)


@dataclass(frozen=True)
class DuplicateShare:
    """Holds the share of documents that are dropped as duplicates: in the sample, and expected in the whole, with bounds."""

    seen: float
    expected: float
    low: float
    high: float


def duplicates(documents: int, sizes: dict[int, int], times: float) -> DuplicateShare:
    """Estimates the share of duplicates in a whole of `times` the sample's documents; `sizes` counts the sample's clusters of
    two and more by their documents.

    A sample with share f contains both documents of a pair with probability f squared, so its share of duplicates is too low.
    The expected value comes from the cluster sizes that make the sample's sizes likely (`whole_sizes`), within the bounds. In
    small samples it depends mostly on its starting point. The lower bound is the sample's share. The upper bound is the
    largest number of pairs (95 % of a Poisson variable) if no cluster were larger: pairs divided by f squared, capped by the
    lower bound of distinct documents by Chao and Lin, 2012.
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
    """Estimates the share of duplicates in a whole of `times` the sample's documents. The sample chose places, such as ranges
    of a file, and then documents in them, at the rate `rate`.

    `groups` counts a cluster's documents in one place, two or more, by their number; `places` counts clusters by the number of
    places, two or more. Neighbors are often similar, for example pages of a site. A sample contains both documents of a pair
    in one place together with that place, and a pair in two places with the square of its probability. So `rate` gives the
    estimate within a place, and the remaining documents of each place count as independent. The bounds of both are multiplied,
    and those of the places' share are widened by chance (`wilson`).
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
    """Estimates the number of clusters, and their documents, from a sample: `sizes` counts clusters by the number of their
    documents in the sample, from 1.

    A cluster of k documents shows m of them with the binomial probability. Expectation maximization approaches the most likely
    mixture of sizes, from a start with fewer large clusters. It stops early, because late rounds fit chance. Clusters that
    show many documents are as large as their share suggests.
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
    for _ in range(ROUNDS):
        weights = weights * (likely.T @ (counts / (likely @ weights))) / counts.sum()
    estimated = counts.sum() * weights / seen_share
    return clusters + float(estimated.sum()), documents + float((estimated * grid).sum())


def _grid(most: float) -> np.ndarray:
    """Lists cluster sizes: the first eight, then each a third larger."""
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
