"""Computes the rungs at which trials are compared, and distributes trials to brackets. All functions are pure."""

from __future__ import annotations

import math


def rungs(grace: int, reduction: int, steps: int) -> list[int]:
    """Lists the rungs below a trial's last step, in steps: grace, grace x reduction, and so on."""
    waits = []
    while grace < steps:
        waits.append(grace)
        grace *= reduction
    return waits


def shares(brackets: int, reduction: int) -> list[float]:
    """Computes the share of all trials that each bracket gets (Li et al. 2018, arXiv 1603.06560, algorithm 1).

    Bracket 0 begins at the first rung, bracket 1 at the second, and so on. The last bracket has no rungs.
    """
    counts = [math.ceil(brackets / (s + 1) * reduction**s) for s in reversed(range(brackets))]
    return [count / sum(counts) for count in counts]


def bracket_of(number: int, brackets: int, reduction: int) -> int:
    """Assigns the trial with this number to a bracket. At any time, each bracket has about its share of the trials."""
    parts, counts = shares(brackets, reduction), [0] * brackets
    for i in range(number + 1):
        chosen = max(range(brackets), key=lambda b: parts[b] * (i + 1) - counts[b])
        counts[chosen] += 1
    return chosen
