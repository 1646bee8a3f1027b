"""Where trials wait to be judged by successive halving, and where on these rungs a trial of HyperBand begins. Pure."""

from __future__ import annotations

import math


def rungs(grace: int, reduction: int, steps: int) -> list[int]:
    """grace, grace x reduction, ...: all below a trial's last step."""
    found = []
    while grace < steps:
        found.append(grace)
        grace *= reduction
    return found


def shares(brackets: int, reduction: int) -> list[float]:
    """Of all trials, the part that each bracket has (Li et al. 2018, arXiv 1603.06560, algorithm 1).

    Bracket 0 begins at the first rung, the next at the second; the last waits on none.
    """
    counts = [math.ceil(brackets / (s + 1) * reduction**s) for s in reversed(range(brackets))]
    return [count / sum(counts) for count in counts]


def bracket(number: int, brackets: int, reduction: int) -> int:
    """The bracket of the trial of this number: whatever the budget is, each has had about its share of it."""
    parts, counts = shares(brackets, reduction), [0] * brackets
    for i in range(number + 1):
        chosen = max(range(brackets), key=lambda b: parts[b] * (i + 1) - counts[b])
        counts[chosen] += 1
    return chosen
