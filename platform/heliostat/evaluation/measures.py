"""Computes the values that are reported with a score: its confidence interval, the score that guessing would get, and the
centered score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from heliostat.recipes.intervals import Z, wilson

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
BY_GUESSING_NONE = ("acc", "exact_match")  # metrics of tasks without choices: guessing scores 0


def interval(score: float, stderr: float | None, values: Sequence[object]) -> tuple[float, float] | None:
    """Computes the 95 % interval of a score. If each value is 0 or 1, computes it from the number of examples, else from the
    standard error.

    Returns None if there is no standard error.
    """
    if values and all(isinstance(v, int | float) and v in (0, 1) for v in values):
        return wilson(score, len(values))
    return None if stderr is None else (score - Z * stderr, score + Z * stderr)


def averaged(score: float, values: Sequence[object]) -> list[float] | None:
    """Returns each example's value as a number. Returns None if the score isn't the mean of the values, as for perplexity."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(values) or not math.isclose(math.fsum(numbers) / len(numbers), score, abs_tol=1e-9):
        return None
    return [int(value) if value in (0, 1) else float(value) for value in numbers]


def chance(kind: str, metric: str, choices: Sequence[tuple[int, int]]) -> float | None:
    """Computes the score that random guessing would get. Returns None if this score isn't defined for the metric.

    `choices`: (number of right choices, number of all choices) of each example.
    """
    if kind == "multiple_choice":
        known = choices and metric in ACCURACIES
        return sum(right / all_ for right, all_ in choices) / len(choices) if known else None
    return 0.0 if metric in BY_GUESSING_NONE else None


def edit_similarity(one: str, other: str) -> float:
    """Computes 1 - d / n of two texts. Returns 1 if both texts are empty.

    d is their edit distance in characters (Levenshtein 1965), and n is the length of the longer text.
    """
    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    letters, places = np.array([ord(letter) for letter in other], np.int64), np.arange(len(other) + 1)
    row = places.copy()
    for count, letter in enumerate(one, 1):
        reached = np.concatenate([[count], np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))])
        row = np.minimum.accumulate(reached - places) + places  # then insertions after each position
    return 1 - int(row[-1]) / longest


def centred(score: float, guessing: float | None) -> float | None:
    """Computes (score - chance) / (1 - chance). 0 means guessing, and 1 is a perfect score (Li et al. 2024, DataComp-LM).

    Returns None if the score of guessing (`guessing`) is unknown or 1.
    """
    return None if guessing is None or guessing >= 1 else (score - guessing) / (1 - guessing)


def average(parts: Sequence[tuple[float, float | None, float]]) -> tuple[float, float | None] | None:
    """Returns the mean of the centered scores, and its standard error. The standard error of the mean is None if a task has no
    standard error. Without tasks, returns None.

    `parts`: (centered score, standard error of the score, chance) of each task.
    """
    if not parts:
        return None
    mean = sum(one for one, _, _ in parts) / len(parts)
    errors = [None if error is None else error / (1 - guessing) for _, error, guessing in parts]
    if any(error is None for error in errors):
        return mean, None
    return mean, math.sqrt(sum(error * error for error in errors if error is not None)) / len(parts)
