"""Estimates what holds of a whole from a sample of it: shares with intervals, and duplicates, of which a sample shows few."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.96  # 95 %


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Computes the 95 % interval of a share (Wilson 1927), of which `hits` of `count` drawn were seen."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, Z * Z
    centre, spread = share + z2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z2 / count)), min(1.0, (centre + spread) / (1 + z2 / count))


@dataclass(frozen=True)
class Share:
    """Holds the share of documents that are dropped as duplicates: in the sample, and expected of the whole, with bounds."""

    seen: float
    expected: float
    low: float
    high: float


def duplicates(documents: int, dropped: int, clusters: int, largest: list[int], times: float) -> Share:
    """Estimates the share of duplicates in a whole of `times` the sample's documents.

    Both of a pair are in a sample of a share f with probability f squared, so the share that the sample shows is too low. Its
    pairs by f squared are those of the whole, which are more than its duplicates where clusters are larger than pairs; the lower
    bound of distinct documents by Chao and Lin (2012) caps them. With its threes, by f cubed, they give the duplicates if
    clusters are all of one size, and too few if some are much larger. The geometric mean of the two is expected: simulated
    mixtures of sizes come within a third of it. The bounds are the sample's own share, and what the most pairs that a Poisson
    variable may stand for (95 %) would mean if no cluster were larger.
    """
    seen = dropped / documents if documents else 0.0
    if times <= 1 or not documents:
        return Share(seen, seen, seen, seen)
    (pairs, threes), single = moments(dropped, clusters, largest), documents - dropped - clusters
    many = (pairs + 1) * (1 - 1 / (9 * (pairs + 1)) + Z / (3 * math.sqrt(pairs + 1))) ** 3  # Byar's approximation
    alike = pairs / (1 + 1.5 * threes * times / pairs) if pairs else 0.0  # of one in k(k - 1) / 2 pairs, k - 1 are duplicates
    tried = ((alike, clusters), (pairs, clusters), (many, max(many, clusters)))
    few, more, most = (max(seen, _whole(documents, dropped, single, p, c, times)) for p, c in tried)
    expected = math.sqrt(few * more)
    return Share(seen, expected, seen, max(expected, most))


def moments(dropped: int, clusters: int, largest: list[int]) -> tuple[float, float]:
    """Counts the pairs and the threes within clusters: of the largest by their sizes, and as if the others were alike."""
    rest, left = clusters - len(largest), dropped - sum(size - 1 for size in largest)
    sizes = [(size, 1) for size in largest] + ([(left / rest + 1, rest)] if rest > 0 else [])
    return sum(k * (k - 1) / 2 * n for k, n in sizes), sum(k * (k - 1) * (k - 2) / 6 * n for k, n in sizes)


def _whole(documents: int, dropped: int, single: int, pairs: float, clusters: float, times: float) -> float:
    by_pairs = pairs * times / documents
    grown = 2 * clusters * documents / max(1, documents - 1) + single / (times - 1)
    distinct = documents - dropped + (single * single / grown if grown else 0.0)
    return max(0.0, min(1.0, by_pairs, 1 - distinct / (documents * times)))
