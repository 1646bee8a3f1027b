"""Computes which numbers of workers can train a job."""

from __future__ import annotations

import math

from heliostat.config.fields import LARGEST
from heliostat.config.train_section import Train


def fitting(train: Train, lanes: int, least: int, most: int) -> list[int]:
    """Lists the numbers of workers in [least, most] that can play the lanes in whole micro-batches.

    The lanes are dealt to replicas: as many workers as share a sample. Workers that divide experts, or state, form whole groups.
    """
    batch, micro, each = train.global_batch, train.micro_batch, train.parallel.sharing
    replicas = divisors(math.gcd(lanes, batch))
    found = [n * each for n in replicas if least <= n * each <= most and batch // n % micro == 0]
    zero = train.zero
    groups = train.parallel.expert, zero.divide_within or 1, zero.copy_within or 1
    return [n for n in found if not any(n % each for each in groups)]


def divisors(number: int) -> list[int]:
    """Lists a number's divisors, ascending; only 1 for a number beyond LARGEST, whose square root is too far to try."""
    if number > LARGEST:
        return [1]
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]
