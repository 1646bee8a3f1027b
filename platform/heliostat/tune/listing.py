"""Lists sweeps in storage, reports their progress, stops them, and builds the job of the best trial."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

from heliostat.config import spec
from heliostat.config.spec import Job
from heliostat.errors import ConfigError, HeliostatError
from heliostat.schema import validate
from heliostat.storage import lease
from heliostat.storage.locations import Location, is_inside
from heliostat.tune import report
from heliostat.tune import trial_record as records
from heliostat.tune.sweep import Sweep, SweepPlan, count, place
from heliostat.tune.trial_record import BestTrial, KeptBest, KeptTrial, SweepProgress

STOP_S = 600.0  # seconds to wait for a sweep to stop
ASKED = 32  # threads; each waits for a sign of life from one sweep's driver


class SweepRow(TypedDict):
    """Describes a sweep in a list of sweeps. `states`: state -> number of trials."""

    name: str
    folder: str
    run_id: str
    metric: str
    running: bool
    states: dict[str, int]
    best: float | None


def sweeps(storage: Location) -> list[SweepRow]:
    """Lists all sweeps in the storage, sorted by name."""
    folders = {name: storage.join(name) for name in storage.folders()}
    known = {
        name: kept for name, folder in folders.items() if (kept := records.read_json(folder.join("sweep.json"), records.KEPT))
    }
    with ThreadPoolExecutor(ASKED) as pool:  # detecting that a driver on another machine died takes seconds
        alive = dict(zip(known, pool.map(running, [folders[name] for name in known]), strict=True))
    rows = list[SweepRow]()
    for name, kept in known.items():
        folder, swept = folders[name], kept["sweep"]
        all_records = records.read(folder)
        best = records.best(all_records, swept.get("mode", "min"))
        rows.append({"name": name, "folder": str(folder), "run_id": kept["run_id"], "metric": swept.get("metric", "loss"),
                      "running": alive[name], "states": dict(Counter(r.status for r in all_records)),
                      "best": best.value if best else None})  # fmt: skip
    return rows


def running(folder: Location) -> bool:
    """Returns whether a live driver holds the sweep's lease. If the driver is on another machine, waits until this driver
    renews the lease, or seems dead."""
    number = lease.newest_number(folder)
    return number > 0 and lease.holder(folder, number) is not None


def find(sweep: str, storage: str) -> Location:
    """Finds a sweep's folder. `sweep`: the folder itself, or the sweep's name. Raises ConfigError if there is no such sweep."""
    named = [Location(storage).join(sweep)] if is_inside(sweep) else []
    for folder in (Location(sweep), *named):
        if folder.join("sweep.json").exists():
            return folder
    raise ConfigError(f"{sweep}: isn't a sweep, and {storage} has no sweep with this name. List the sweeps: heliostat sweep list")


def read(folder: Location) -> tuple[SweepPlan, KeptTrial]:
    kept = records.read_json(folder.join("sweep.json"), records.KEPT)
    if kept is None:
        raise ConfigError(f"{folder}: isn't a sweep (no sweep.json). List the sweeps: heliostat sweep list")
    return SweepPlan(_sweep(folder, kept), spec.with_rules(kept["job"]), None), kept


def _sweep(folder: Location, kept: KeptTrial) -> Sweep:
    return validate(Sweep, kept["sweep"], f"{folder.join('sweep.json')}: sweep")


def show(folder: Location) -> SweepProgress:
    """Reports a sweep's progress, with all trials, the best first."""
    plan, kept = read(folder)
    all_records = records.read(folder)
    best = records.best(all_records, plan.sweep.mode)
    kept_result = records.read_json(folder.join("result.json"), records.RESULT)
    done = (kept_result and kept_result.get("best")) or KeptBest()
    model_uri = done.get("model_uri") if best and done.get("trial") == best.number else None
    shown: BestTrial | None = None if best is None else {"trial": best.number, "value": best.value, "params": best.params,
                                                         "run_id": best.run_id, "model_uri": model_uri}  # fmt: skip
    return {
        "sweep": plan.sweep.name,
        "folder": str(folder),
        "run_id": kept["run_id"],
        "running": running(folder),
        "seconds": kept["seconds"],
        "steps": sum(r.step for r in all_records),
        "metric": plan.sweep.metric,
        "best": shown,
        "trials": report.rows(plan, all_records),
    }  # fmt: skip


def progress(folder: Location) -> tuple[int, int]:
    """Returns (ended trials, planned trials). If the number of planned trials isn't known, the second number counts the recorded
    trials."""
    all_records, kept = records.read(folder), records.read_json(folder.join("sweep.json"), records.KEPT)
    planned = count(_sweep(folder, kept)) if kept else None
    return sum(r.over for r in all_records), max(planned or 0, len(all_records))


def stop(folder: Location) -> None:
    """Requests a stop and waits until the sweep has stopped.

    Raises ConfigError if the sweep isn't running, HeliostatError if the sweep doesn't stop within STOP_S seconds.
    """
    if not running(folder):
        raise ConfigError(f"{folder}: isn't running, so there is nothing to stop")
    folder.join("stop").write(b"asked to stop")
    deadline = time.monotonic() + STOP_S
    while running(folder):
        if time.monotonic() > deadline:
            raise HeliostatError(f"{folder}: the sweep didn't stop within {STOP_S:.0f} s. Run the command again to wait longer")
        time.sleep(1.0)


def best_job(folder: Location) -> dict[str, object]:
    """Builds the job of the best trial, named SWEEP-best: the base job with the best parameters, as plain data.

    Raises ConfigError if no trial has finished.
    """
    plan, _ = read(folder)
    best = records.best(records.read(folder), plan.sweep.mode)
    if best is None:
        raise ConfigError(f"{folder}: no trial has finished yet. Continue with `heliostat sweep run SWEEP.yaml --resume`")
    raw = place(plan.base, best.params)
    raw["name"] = f"{plan.sweep.name}-best"
    return validate(Job, raw, f"{folder}: the job of trial {best.number}").dump()
