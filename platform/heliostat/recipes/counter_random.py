"""Draws random numbers that depend only on a seed and a key, with the same bits on every device.

    normals(seed, keys, stream=1, count=4096)   # fp32 [len(keys), 4096], on the device of `keys`
    words(seed, keys, stream=0, count=2)        # int64 [len(keys), 2]; `uniform` and `normal` map each to a number

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The generator has no state. It
encrypts a counter, here (block, stream, key), with the seed, in torch's integer operations.

To make a normal number from a word, the module computes the inverse of the normal distribution function at this word, from a
table of parabolas. This needs only multiplications and additions, which IEEE 754 defines to the last bit. Logarithms and sines
aren't used, because their last bits differ between devices.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch

from heliostat.recipes.constants import Constant

WORD = 2**32 - 1
PART = 1 << 16  # words per block on a CPU
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the seed's halves in each round
CUTS = 6  # each octave of the tail probability has 2^CUTS parabolas
OCTAVES = 32  # octaves of the tail probability, from 2^-33 to 1/2
FRACTION = 23 - CUTS  # bits of an fp32 number that give its position inside a parabola
POINTS = 0.067, 0.5, 0.933  # positions inside a parabola at which it is exact, near the Chebyshev nodes
GRID = 2.0**-28  # slopes and curvatures are multiples of this number


def normals(seed: int, keys: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """Draws `count` normal numbers for each key: fp32 [keys, count], on the keys' device. For the arguments, see `words`.

    On a CPU, this function draws the numbers in blocks that fit into the caches.
    """
    if keys.device.type != "cpu":
        return normal(words(seed, keys, stream, count))
    drawn, together = torch.empty(len(keys), count), max(1, PART // count)
    for some in range(0, len(keys), together):
        for first in range(0, count, PART):
            part = drawn[some : some + together, first : first + PART]
            part.copy_(normal(words(seed, keys[some : some + together], stream, part.shape[1], first)))
    return drawn


def words(seed: int, keys: torch.Tensor, stream: int, count: int, first: int = 0) -> torch.Tensor:
    """Draws `count` words for each key: int64 [keys, count] in [0, 2^32), on the keys' device.

    `seed`: below 2^64. `keys`: int64 [keys]. `stream`: below 2^32; use a different stream for each purpose, so that the numbers
    are independent. `first`: the index of the first word to draw for each key, a multiple of 4.
    """
    keys, begin, end = keys.view(-1, 1), first // 4, -(-(first + count) // 4)
    shape, device = (len(keys), end - begin), keys.device
    # c1 and c3 may have more than 32 bits: later operations cut them to 32
    c0, c1 = torch.arange(begin, end, device=device).expand(shape), torch.full((1, 1), stream, device=device)
    c2, c3 = (keys & WORD).expand(shape), keys >> 32
    low, high = seed & WORD, seed >> 32 & WORD
    for _ in range(ROUNDS):
        one, two = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # products of 64 bits: torch's integers wrap
        c0 = (two >> 32).bitwise_xor_(c1).bitwise_xor_(low).bitwise_and_(WORD)
        c2 = (one >> 32).bitwise_xor_(c3).bitwise_xor_(high).bitwise_and_(WORD)
        c1, c3 = two, one
        low, high = (low + WEYL[0]) & WORD, (high + WEYL[1]) & WORD
    four = torch.stack([c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)], -1)
    return four.view(len(keys), -1)[:, :count]


def uniform(words: torch.Tensor) -> torch.Tensor:
    """Maps words to uniform numbers: multiples of 2^-24 in [0, 1), fp32."""
    return (words >> 8).float().mul_(2.0**-24)


def normal(words: torch.Tensor) -> torch.Tensor:
    """Maps words to normal numbers: fp32, between -6.34 and 6.34.

    The results differ by at most 2e-7 from the exact inverse of the normal distribution. For results above 1, this limit is a
    relative error.
    """
    signed = (words << 1).sub_(WORD).float()  # its absolute value / 2^33 is the tail probability
    bits = signed.view(torch.int32)
    number = (bits >> FRACTION).bitwise_and_((1 << 31 - FRACTION) - 1).sub_(127 << CUTS).flatten()
    inside = (bits & (1 << FRACTION) - 1).float().flatten()
    height, slope, curvature = (values.index_select(0, number) for values in TABLE.on(words.device))
    return curvature.mul_(inside).add_(slope).mul_(inside).add_(height).view(words.shape).copysign_(signed)


def exact_heights() -> np.ndarray:
    """Computes the inverse of the normal distribution function at three points of each parabola, fp64 [3, parabolas].

    Parabola i covers tail probabilities from 2^(e - 33) (1 + j / 2^CUTS). Here, e and j are the quotient and the remainder of i
    divided by 2^CUTS.
    """
    octave, cut = np.divmod(np.arange(OCTAVES << CUTS), 1 << CUTS)
    tails = np.ldexp(1 + (cut + np.array(POINTS)[:, None]) / (1 << CUTS), octave - OCTAVES - 1)
    return -np.vectorize(NormalDist().inv_cdf)(tails)


def parabolas(heights: np.ndarray) -> np.ndarray:
    """Fits a parabola through the three points of each column. Returns heights, slopes, and curvatures: fp32 [3, parabolas + 1].

    Rounds the results, so that they are the same on machines whose heights differ in the last bit.
    """
    (first, second, third), (low, middle, high) = heights, POINTS
    rise = (second - first) / (middle - low)
    curvature = ((third - second) / (high - middle) - rise) / (high - low)
    slope = rise - curvature * (low + middle)
    height = first - low * (slope + curvature * low)
    coefficients = np.stack([height, np.round(slope / GRID) * GRID, np.round(curvature / GRID) * GRID])
    scaled = coefficients * np.ldexp(1.0, [[0], [-FRACTION], [-2 * FRACTION]])
    return np.pad(scaled, ((0, 0), (0, 1))).astype(np.float32)  # the last parabola is only for a tail probability of 1/2: 0


TABLE = Constant(torch.from_numpy(parabolas(exact_heights())))
