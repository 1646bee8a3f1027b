"""Measures the effect of a fault on a run, from the run's records and from the output of the run's command. All functions are
pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from heliostat.chaos.process import STEP
from heliostat.runs.goodput import RecordedAttempt
from heliostat.runs.verify import VerifyReport

Lines = Sequence[tuple[float, str]]  # wall-clock time, line of output


@dataclass(frozen=True)
class FaultEffect:
    """Holds the observations of a run with a fault. Times are wall-clock seconds.

    `struck`: the time of the fault. `seen`: when the run noticed the fault. `cured`: when the fault was over. If a time is None,
    heliostat takes this time from the start and end of the run's attempts.
    """

    struck: float
    seen: float | None
    cured: float | None
    lines: Lines
    attempts: list[RecordedAttempt]


def first_end(attempts: Iterable[RecordedAttempt], since: float) -> float | None:
    """Returns the end of the first attempt that a fault at `since` may have ended; None if there is no such attempt."""
    return min((a.seen for a in attempts if a.outcome != "finished" and a.seen >= since), default=None)


def detected_s(effect: FaultEffect) -> float | None:
    """Computes the seconds from the fault until the run noticed the fault; None if the run didn't notice the fault."""
    at = effect.seen if effect.seen is not None else first_end(effect.attempts, effect.struck)
    return None if at is None else max(0.0, at - effect.struck)


def recovered_s(effect: FaultEffect) -> float | None:
    """Computes the seconds from the fault to the run's first new step, which comes after all restarts that the fault caused.

    None if there is no new step.
    """
    if effect.cured is not None:
        return effect.cured - effect.struck
    ends = [a.seen for a in effect.attempts if a.outcome != "finished" and a.seen >= effect.struck]
    since = max([effect.struck, *ends])
    steps = [(at, int(match[1])) for at, line in effect.lines if (match := STEP.search(line))]
    before = max((step for at, step in steps if at <= since), default=0)
    after = next((at for at, step in steps if at > since and step > before), None)
    return None if after is None else after - effect.struck


def pace_s(lines: Lines) -> float:
    """Computes the seconds per step from the command's output so far; 0 if this output shows fewer than two steps."""
    steps = [(at, int(match[1])) for at, line in lines if (match := STEP.search(line))]
    if len(steps) < 2 or steps[-1][1] <= steps[0][1]:
        return 0.0
    return (steps[-1][0] - steps[0][0]) / (steps[-1][1] - steps[0][1])


def recomputed_steps(attempts: Iterable[RecordedAttempt]) -> int:
    """Counts the steps that one attempt reported and the next attempt computed again."""
    ordered = sorted(attempts, key=lambda a: a.started)
    return sum(max(0, before.reached - after.start_step) for before, after in pairwise(ordered))


def row(fault: str, effect: FaultEffect, report: VerifyReport, loss: float, expected: float, goodput: float) -> dict[str, Any]:
    """Builds the fault's row of the table.

    `report`: the result of `verify`. `loss` and `expected`: the loss of the last step in this run, and in the run without faults.
    """
    return {
        "fault": fault,
        "detected_s": rounded(detected_s(effect)),
        "recovered_s": rounded(recovered_s(effect)),
        "recomputed_steps": recomputed_steps(effect.attempts),
        "lost": report["lost"],
        "repeated": report["repeated"],
        "loss_difference": abs(loss - expected),
        "goodput": round(goodput, 4),
    }


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)


def broken(fault: str) -> dict[str, object]:
    """Builds the row of a fault whose run didn't finish."""
    keys = ("detected_s", "recovered_s", "recomputed_steps", "lost", "repeated", "loss_difference", "goodput")
    return {"fault": fault, **dict.fromkeys(keys)}


def problems(row: dict[str, Any], report: VerifyReport, curve: list[int], steps: int) -> list[str]:
    """Lists the problems of a finished run. The list is empty if the run is as good as the run without faults.

    `curve`: the steps that have a loss in MLflow. `steps`: the job's number of steps.
    """
    faults = []
    if row["lost"] or row["repeated"]:
        faults.append(f"the run lost {row['lost']} samples and repeated {row['repeated']}")
    if not report["ok"] or report["steps"] != steps:
        faults.append(f"the run's receipts differ from the run's data: {report['first_difference']}")
    if curve != list(range(1, steps + 1)):
        faults.append("MLflow doesn't have the loss of every step exactly once")
    if not math.isfinite(row["loss_difference"]):
        faults.append("the run's last loss isn't finite")
    return faults


def unregistered(versions: int, expected: bool) -> list[str]:
    """Lists the problem if a run registered a wrong number of model versions. The right number is 1 if `expected` is true,
    otherwise 0."""
    return [] if versions == int(expected) else [f"the run's model was registered {versions} times"]
