"""Plans the job of a job file (`heliostat plan`): in the job's own parallelism configuration, or in all configurations, which are
then ranked.

With `--calibrate RUN`, a measured run corrects the device's efficiencies. The run's ledger contains the measured computing time
of the steps, and the plan contains the expected time. heliostat corrects the efficiencies by the ratio of these times. So the
next plan for this device starts from measured values.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from heliostat.checkpoint import layout
from heliostat.cluster import cluster_file
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.plan import auto, hardware
from heliostat.plan.hardware import Efficiency, Prices
from heliostat.plan.layouts import Candidate
from heliostat.plan.planner import bound, plan, planners, prepare
from heliostat.plan.ranking import ranking
from heliostat.runs import goodput
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage.locations import Location
from heliostat.validation import check

LEAST = 2  # steps after the first step, which includes the start of kernels


def plan_file(
    path: Path,
    settings: list[str] | None = None,
    cluster: Path | None = None,
    device: str | None = None,
    prices: Path | None = None,
    run: Location | None = None,
    write: Path | None = None,
    rank: bool = False,
) -> dict[str, object]:
    """Plans the job of a job file. Reads the datasets if the storage is reachable.

    `run`: a measured run that corrects the device's efficiencies. `write`: the file for the corrected efficiencies. `rank`:
    whether to plan all configurations instead of only the job's own.
    """
    table, pools = hardware.table(prices), cluster_file.read(cluster) if cluster else None
    job, recipe, unread = prepare(path, settings, pools)  # comes last, because it reads from the datasets' stores
    notes = [f"planned without the datasets: {unread}"] if unread else []
    if run:
        table, note = calibrated(run, table, pools, device, write)
        notes.append(note)
    if job.train.parallel.auto and not rank:
        device = device or (None if pools else auto.here(job))
        wanted = auto.settled(check.load_job(path, settings, pools), pools, device=device, prices=table, unread=unread)
        job, recipe, _ = bound(*check.check_job(wanted), unread)
    if rank:
        ranked = ranking(job, recipe, pools, device, table)
        return {**ranked.dump(), "notes": ranked.notes + notes}
    return {**plan(job, recipe, pools, device, table), "notes": notes}


def calibrated(
    run: Location, prices: Prices, cluster: ClusterFile | None, device: str | None, write: Path | None
) -> tuple[Prices, str]:
    """Plans a run's own job, and corrects the efficiencies of the planned device by the run's measured step time. Returns the
    corrected price table, and a note."""
    measurement = measured(run)
    job, recipe, _ = bound(*check.check_job(measurement.job))
    planner = planners(job, recipe, cluster, device, prices)[-1]
    planned, name = planner.chosen(), planner.device.name
    efficiency = corrected(planner.device.efficiency, planned, measurement.step_s)
    if write:
        write_efficiency(write, name, efficiency, run, measurement)
    note = (
        f"{name} as measured in {run}: {measurement.step_s:.3g} s per step over {measurement.steps} steps; the "
        f"plan predicted {planned.speed['step_s']:.3g}"
    ) + (f"; written to {write}" if write else "")
    return {**prices, "efficiency": {**prices["efficiency"], name: asdict(efficiency)}}, note


@dataclass(frozen=True)
class Measured:
    """Holds a run's measurement: its job with the run's number of workers, the computing seconds per step, and the number of
    steps."""

    job: Job
    step_s: float
    steps: int


def measured(run: Location) -> Measured:
    """Reads a run's measurement. Raises ConfigError if the run has no checkpoint, no ledger, or too few steps. The checkpoint is
    needed because it contains the job."""
    checkpoint = layout.latest(run)
    if not checkpoint:
        raise ConfigError(
            f"--calibrate: {run}: the run has no checkpoint to read the job from. Continue the run until it saves a checkpoint"
        )
    attempts = [(one, *rate) for one in goodput.read(run) if (rate := pace(one))]
    if not attempts:
        raise ConfigError(f"--calibrate: {run}: no attempt of the run has {LEAST} steps after its first step. Continue the run")
    longest, seconds, steps = max(attempts, key=lambda one: one[2])
    return Measured(checkpoint.job.on(longest.workers), seconds, steps)


def pace(attempt: RecordedAttempt) -> tuple[float, int] | None:
    """Computes an attempt's computing seconds per step, and the number of measured steps. Returns None if there are too few
    steps.

    If the attempt recorded two or more times, measures from the first record to the last, because the time before the first
    record includes warm-up.
    """
    marks = attempt.marks if len(attempt.marks) > 1 else [(attempt.start_step, 0.0), *attempt.marks]
    (first, began), (last, ended) = marks[0], marks[-1]
    return ((ended - began) / (last - first), last - first) if last - first >= LEAST and ended > began else None


def corrected(efficiency: Efficiency, planned: Candidate, step_s: float) -> Efficiency:
    """Corrects a device's efficiency, so that the planned step takes as long as the measured step.

    Corrects only the efficiency of computing. Communication and copies keep the planned times. If communication and copies take
    at least half of the measured step, corrects computing by the ratio of the measured to the planned time of a complete step.
    """
    parts = planned.parts
    computing = parts["forward_backward"] + parts["replaying"] + parts["updating"]
    other = parts["exposed"] + parts["copying"]
    slower = (step_s - other) / computing if step_s > 2 * other else step_s / (computing + other)
    rates = {k: v / slower for k, v in asdict(efficiency).items() if k not in ("fused", "launch")}
    return Efficiency(**rates, fused=efficiency.fused, launch=efficiency.launch * slower)


def write_efficiency(path: Path, device: str, efficiency: Efficiency, run: Location, measured: Measured) -> None:
    """Writes a device's efficiency to a file for `--prices`."""
    values = {k: float(f"{v:.4g}") for k, v in asdict(efficiency).items()}
    head = (
        f"# What {device} reached in {run}: {measured.step_s:.4g} s of computing per step, over {measured.steps} steps on "
        f"{measured.job.workers.most} workers.\n# To use these values: heliostat plan JOB --prices {path}\n"
    )
    path.write_text(head + yaml.safe_dump({"efficiency": {device: values}}, sort_keys=False), encoding="utf-8")
