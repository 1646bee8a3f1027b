"""Computes the progress of a submitted run or sweep from its records in storage."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from heliostat.errors import HeliostatError
from heliostat.runs import goodput
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage.locations import Location


class RunProgress(TypedDict):
    """Describes the progress of a run or a sweep. `eta_s`: seconds left. `note`: the reason if the progress is unknown."""

    step: int | None
    steps: int | None
    fraction: float | None
    eta_s: float | None
    unit: NotRequired[str]  # "trial" for a sweep
    note: NotRequired[str]


def of_run(run: Location, steps: int) -> RunProgress:
    """Computes a run's progress from its ledger in storage: the number and share of finished steps, and the seconds left if the
    speed stays the same."""
    try:
        attempts = goodput.read(run)
    except (HeliostatError, OSError) as e:
        return {"step": None, "steps": steps, "fraction": None, "eta_s": None, "note": str(e)}
    if not attempts:
        return {"step": 0, "steps": steps, "fraction": 0.0, "eta_s": None}
    last = max(attempts, key=lambda a: a.started)
    return {"step": last.reached, "steps": steps, "fraction": last.reached / steps, "eta_s": eta(last, steps)}


def of_sweep(folder: Location) -> RunProgress:
    """Computes a sweep's progress from its record in storage: the number of finished trials, out of all planned trials."""
    from heliostat.tune import listing

    try:
        over, trials = listing.progress(folder)
    except (HeliostatError, OSError) as e:
        return {"step": None, "steps": None, "fraction": None, "eta_s": None, "unit": "trial", "note": str(e)}
    return {"step": over, "steps": trials, "fraction": over / max(1, trials), "eta_s": None, "unit": "trial"}


def eta(attempt: RecordedAttempt, steps: int) -> float | None:
    """Estimates the seconds left, from the time per step of this attempt. This time includes data, communication, checkpoints,
    and evaluation.

    Returns None if the attempt hasn't finished a step yet.
    """
    done = attempt.reached - attempt.start_step
    spent = sum(attempt.parts.get(p, 0.0) for p in ("computing", "data", "communicating", "checkpoint", "evaluating"))
    return (steps - attempt.reached) * spent / done if done else None
