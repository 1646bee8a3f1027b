"""Compares the results of two models on the same suite, example by example.

Both models answer the same examples, so the interval of the paired difference is narrower than the intervals of the scores
suggest (Miller 2024, Adding Error Bars to Evals).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from typing_extensions import TypedDict

from heliostat.errors import ConfigError
from heliostat.evaluation.suite import Suite, same
from heliostat.recipes import intervals
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, open_
from heliostat.text import brief


@open_
class PairedRow(TypedDict):
    """Describes the parts of a task's row that are compared. `values`: each example's value, or None if the score isn't their
    mean. `examples_digest`: see `digest`."""

    task: str
    values: list[float] | None
    examples_digest: str


@open_
class PairedResult(TypedDict):
    """Describes the parts of a result file that are compared."""

    suite: dict[str, object]
    tasks: list[PairedRow]


RESULT = Format(PairedResult, "result to compare with", ConfigError, fix="Score its model again, with this version of heliostat")


class PairedDifference(NamedTuple):
    """Contains a task's score minus the other model's score, with its 95 % interval, and the number of examples whose value is
    higher, and lower. All are None if the score isn't the mean of its examples' values."""

    task: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    higher: int | None = None
    lower: int | None = None


def digest(texts: Iterable[str]) -> str:
    """Returns a digest of a task's examples, in their order: of each example's question and right answer."""
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return total.hexdigest()[:16]


def read(place: Location, suite: Suite, digests: Mapping[str, str]) -> PairedResult:
    """Reads the result file of the other model. `digests`: the digest of each task's examples.

    Raises ConfigError unless the other model was scored on the same examples with the same settings.
    """
    try:
        other = RESULT.read(place)
    except FileNotFoundError:
        raise ConfigError(f"--compare: no such file ({place}). Pass the --out file of another model on this suite") from None
    except OSError as e:
        raise ConfigError(f"--compare: can't be read ({brief(e)}). Pass the --out file of another model on this suite") from e
    if not same(other["suite"], suite):
        raise ConfigError(f"--compare: scored with other settings ({place}). Score its model with this suite again")
    theirs = {row["task"]: row["examples_digest"] for row in other["tasks"]}
    if changed := [task for task in {**digests, **theirs} if theirs.get(task) != digests.get(task)]:
        raise ConfigError(f"--compare: other examples of {changed[0]} ({place}). Score its model with this suite again")
    return other


def differences(rows: Iterable[PairedRow], other: PairedResult) -> list[PairedDifference]:
    """Computes the difference of each task's score from the other model's score."""
    before = {row["task"]: row["values"] for row in other["tasks"]}
    return [_difference(row["task"], row["values"], before[row["task"]]) for row in rows]


def _difference(task: str, values: list[float] | None, before: list[float] | None) -> PairedDifference:
    if values is None or before is None:
        return PairedDifference(task)
    change = np.subtract(values, before)
    return PairedDifference(task, *intervals.mean(change), int((change > 0).sum()), int((change < 0).sum()))
