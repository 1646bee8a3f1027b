"""Estimates how often a run of N devices is interrupted, and how often it should save a checkpoint. Pure functions.

With a mean time mu between interruptions, a save that stops training for C seconds, and R seconds to restart, the interval W
that wastes least is sqrt(2 C mu) (Young 1974, doi 10.1145/361147.361115; Daly 2006, doi 10.1016/j.future.2004.11.016, adds terms
that vanish for C << mu). The waste is C / W for saving, and (W / 2 + R) / mu for what is computed again and for restarting.
"""

from __future__ import annotations

import math

HOUR = 3600.0


def mean_time_between(device_hours: float, devices: float) -> float:
    """Computes the mean seconds between interruptions of the whole run: the failure rates of the devices add up."""
    return device_hours / devices * HOUR


def best_interval(blocked_s: float, between_s: float, upload_s: float = 0.0) -> float:
    """Computes the checkpoint interval in seconds that wastes least time.

    Never shorter than a save takes to reach storage, because at most one is in flight.
    """
    return max(math.sqrt(2 * blocked_s * between_s), upload_s)


def waste(interval_s: float, blocked_s: float, between_s: float, restart_s: float) -> float:
    """Computes the share of the time that is not new training (saving, recomputing, restarting), at most 1."""
    return min(1.0, blocked_s / interval_s + (interval_s / 2 + restart_s) / between_s)
