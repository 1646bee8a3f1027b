"""Turns a run that was measured into efficiencies for the plan (`heliostat plan JOB --calibrate RUN`).

A run's ledger says how long its steps computed, and the plan says how long they should have: their ratio corrects all rates of
the run's device. So the next plan for that device starts from what was measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from heliostat.checkpoint import layout
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.plan.hardware import Efficiency
from heliostat.runs import goodput
from heliostat.runs.goodput import Attempt
from heliostat.storage.locations import Location

LEAST = 2  # steps after the first, which starts the kernels


@dataclass(frozen=True)
class Measured:
    """Holds what a run measured: its job on the workers that it had, and the seconds that a step computed, over so many steps."""

    job: Job
    step_s: float
    steps: int


def measured(run: Location) -> Measured:
    """Reads what a run measured; ConfigError if it did not: no checkpoint (with its job), no ledger, too few steps."""
    checkpoint = layout.latest(run)
    if not checkpoint:
        raise ConfigError(f"--calibrate: {run}: has no checkpoint, and so no record of its job; let it train until it saves one")
    found = [(one, *rate) for one in goodput.read(run) if (rate := pace(one))]
    if not found:
        raise ConfigError(
            f"--calibrate: {run}: measured no steps: no attempt in its ledger has {LEAST} after the first; train it longer"
        )
    longest, seconds, steps = max(found, key=lambda one: one[2])
    return Measured(checkpoint.job.on(longest.workers), seconds, steps)


def pace(attempt: Attempt) -> tuple[float, int] | None:
    """Computes an attempt's seconds of computing a step and over how many steps; None if there are too few.

    From its first mark to its last, where it has two: what comes before the first includes warming up.
    """
    marks = attempt.marks if len(attempt.marks) > 1 else [(attempt.start_step, 0.0), *attempt.marks]
    (first, began), (last, ended) = marks[0], marks[-1]
    return ((ended - began) / (last - first), last - first) if last - first >= LEAST and ended > began else None


def corrected(efficiency: Efficiency, planned: dict[str, Any], step_s: float) -> Efficiency:
    """Corrects a device's efficiency so that a planned step takes as long as it was measured.

    What computes is corrected; communication and copies stay as planned, unless there would be no time left to compute.
    """
    parts = planned["parts"]
    computing = parts["forward_backward"] + parts["replaying"] + parts["updating"]
    beside = parts["exposed"] + parts["copying"]
    slower = (step_s - beside) / computing if step_s > 2 * beside else step_s / (computing + beside)
    rates = {k: v / slower for k, v in asdict(efficiency).items() if k not in ("fused", "launch")}
    return Efficiency(**rates, fused=efficiency.fused, launch=efficiency.launch * slower)


def write(path: Path, device: str, efficiency: Efficiency, run: Location, measured: Measured) -> None:
    """Writes a device's efficiency as a file that `--prices` takes."""
    values = {k: float(f"{v:.4g}") for k, v in asdict(efficiency).items()}
    head = (
        f"# What {device} reached in {run}: {measured.step_s:.4g} s of computing a step, over {measured.steps} steps on "
        f"{measured.job.workers.most} workers.\n# Lay it over the plan's table: heliostat plan JOB --prices {path}\n"
    )
    path.write_text(head + yaml.safe_dump({"efficiency": {device: values}}, sort_keys=False), encoding="utf-8")


def laid_over(prices: dict[str, Any], device: str, efficiency: Efficiency) -> dict[str, Any]:
    """Returns a price table with another efficiency of a device."""
    return {**prices, "efficiency": {**prices["efficiency"], device: asdict(efficiency)}}
