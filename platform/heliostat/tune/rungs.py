"""Computes the rungs where trials wait to be judged by successive halving, and where a trial of HyperBand begins. Pure."""

from __future__ import annotations

import math


def rungs(grace: int, reduction: int, steps: int) -> list[int]:
    """Lists the rungs grace, grace x reduction, ... that lie below a trial's last step."""
    found = []
    while grace < steps:
        found.append(grace)
        grace *= reduction
    return found


def shares(brackets: int, reduction: int) -> list[float]:
    """Computes the share of all trials that each bracket gets (Li et al. 2018, arXiv 1603.06560, algorithm 1).

    Bracket 0 begins at the first rung, the next at the second; the last waits on none.
    """
    counts = [math.ceil(brackets / (s + 1) * reduction**s) for s in reversed(range(brackets))]
    return [count / sum(counts) for count in counts]


def bracket(number: int, brackets: int, reduction: int) -> int:
    """Assigns the trial of this number to a bracket, so that whatever the budget is, each bracket has had about its share."""
    parts, counts = shares(brackets, reduction), [0] * brackets
    for i in range(number + 1):
        chosen = max(range(brackets), key=lambda b: parts[b] * (i + 1) - counts[b])
        counts[chosen] += 1
    return chosen
