"""Plans the job of a job file, in its own layout or ranked among all, with what a run has measured (`heliostat plan`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heliostat.cluster import cluster_file
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.plan import auto, calibrate, hardware
from heliostat.plan.planner import bound, plan, planners, prepare
from heliostat.plan.ranking import ranking
from heliostat.storage.locations import Location
from heliostat.validation import check


def plan_file(
    path: Path,
    settings: list[str] | None = None,
    cluster: Path | None = None,
    device: str | None = None,
    prices: Path | None = None,
    run: Location | None = None,
    write: Path | None = None,
    rank: bool = False,
) -> dict[str, Any]:
    """Plans the job of a job file; its datasets are looked at if they can be reached.

    `run`: a measured run that the device's efficiencies are taken from, and `write` the file that gets them. `rank`: all layouts
    instead of the job's own.
    """
    table, pools = hardware.table(prices), cluster_file.read(cluster) if cluster else None
    job, recipe, unread = prepare(path, settings)  # last: it asks the stores of the datasets
    notes = [f"the datasets were not looked at: {unread}"] if unread else []
    if run:
        table, note = calibrated(run, table, pools, device, write)
        notes.append(note)
    if job.train.parallel.auto and not rank:
        device = device or (None if pools else auto.here(job))
        job, recipe, _ = bound(*check.check_job(auto.settled(check.load_job(path, settings), pools, device=device, prices=table)))
    found = (ranking if rank else plan)(job, recipe, pools, device, table)
    found["notes"] += notes
    return found


def calibrated(
    run: Location, prices: dict[str, Any], cluster: ClusterFile | None, device: str | None, write: Path | None
) -> tuple[dict[str, Any], str]:
    """Plans a run's own job and corrects the efficiencies of its device by what it measured; returns them in the price table."""
    said = calibrate.measured(run)
    job, recipe, _ = bound(*check.check_job(said.job))
    planner = planners(job, recipe, cluster, device, prices)[-1]
    planned, name = planner.chosen(), planner.device.name
    efficiency = calibrate.corrected(planner.device.efficiency, planned, said.step_s)
    if write:
        calibrate.write(write, name, efficiency, run, said)
    note = (
        f"{name} as measured in {run}: {said.step_s:.3g} s a step over {said.steps} steps, where the plan said "
        f"{planned['speed']['step_s']:.3g}" + (f"; written to {write}" if write else "")
    )
    return calibrate.laid_over(prices, name, efficiency), note
