"""Runs and shows sweeps: `heliostat sweep` run, list, show, stop, and `heliostat train --from-sweep`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import completion
from heliostat.cli.common import command, finish, out, print_table, program
from heliostat.cli.groups import SWEEP
from heliostat.cli.jobs import checked, jobs_on, send
from heliostat.cli.options import Follow, Queue, Settings, Target, Verbose, argument, flag
from heliostat.errors import ConfigError

if TYPE_CHECKING:
    from heliostat.storage.locations import Location
    from heliostat.tune.trial_record import SweepProgress

DEFAULT_STORAGE = ".heliostat/runs"
Storage = Annotated[str, typer.Option(metavar="FOLDER", help="Folder or s3:// prefix of runs and sweeps")]
SweepName = Annotated[str, argument("SWEEP", "A sweep's folder (STORAGE/NAME), or its name in --storage", completion.sweeps)]
Top = Annotated[int, typer.Option(min=1, help="Number of best trials to show")]


@command(SWEEP, "run", example="jobs/sweeps/quickstart.yaml --set budget.trials=8")
def tune(
    sweep: Annotated[Path, argument("SWEEP", "A sweep file, such as jobs/sweeps/quickstart.yaml", completion.sweep_files)],
    setting: Settings = None,
    resume: Annotated[bool, flag("--resume", help="Resume the sweep: finished trials don't run again")] = False,
    retry_failed: Annotated[
        bool, flag("--retry-failed", help="With --resume: failed trials continue from their last checkpoints")
    ] = False,
    overwrite: Annotated[bool, flag("--overwrite", help="Delete the sweep of this name and start from scratch")] = False,
    transfer: Annotated[
        Path | None,
        typer.Option(metavar="JOB", help="A large job; heliostat extrapolates its learning rate from the widths in the sweep"),
    ] = None,
    cluster: Target = None,
    follow: Follow = False,
    queue: Queue = None,
    verbose: Verbose = False,
) -> None:
    """Search for a job's best hyperparameters with parallel runs on Ray Tune (docs/tuning.md)."""
    from heliostat.storage.run_folder import require_one_way
    from heliostat.tune.driver import tune as run

    require_one_way(resume or retry_failed, overwrite)
    if cluster:
        if transfer:
            raise ConfigError(
                f"--transfer: not with --cluster ({transfer}). After the sweep, run this with --resume, without --cluster"
            )
        flags = {"--resume": resume, "--retry-failed": retry_failed, "--overwrite": overwrite}
        _submit(sweep, setting or [], cluster, queue, tuple(f for f, is_set in flags.items() if is_set), follow)
        return
    if transfer:
        from heliostat.tune.sweep import load
        from heliostat.tune.transfer import check

        check(load(sweep, setting), transfer)
    result = run(sweep, setting, resume or retry_failed, retry_failed, overwrite, verbose)
    _print(result, len(result["trials"]))
    finish({**result, "transfer": _carry(result["folder"], transfer)} if transfer else result)


@command(SWEEP, "list", example="--storage .heliostat/runs")
def sweeps(storage: Storage = DEFAULT_STORAGE) -> None:
    """List sweeps: state, trials, best score."""
    from heliostat.storage.locations import Location
    from heliostat.tune.listing import sweeps as find

    result = find(Location(storage))
    for s in result:
        best = f"best {s['metric']} {s['best']:.4g}" if s["best"] is not None else "no trial has finished"
        states = ", ".join(f"{count} {status}" for status, count in s["states"].items()) or "no trials"
        out.print(f"{s['name']}: {'running, ' if s['running'] else ''}{states}; {best}")
    if not result:
        out.print(f"no sweep in {storage}. Start one: heliostat sweep run SWEEP.yaml")
    finish({"sweeps": result})


@command(SWEEP, example="quickstart --top 3")
def show(sweep: SweepName, top: Top = 10, storage: Storage = DEFAULT_STORAGE) -> None:
    """Show a sweep's best trials."""
    from heliostat.tune import listing

    _show(listing.find(sweep, storage), top)


@command(SWEEP, example="quickstart")
def stop(sweep: SweepName, top: Top = 10, storage: Storage = DEFAULT_STORAGE) -> None:
    """Stop a sweep: its trials save a checkpoint first. Then show its best trials."""
    from heliostat.tune import listing

    folder = listing.find(sweep, storage)
    listing.stop(folder)
    _show(folder, top)


def _show(folder: Location, top: int) -> None:
    from heliostat.tune import listing

    result = listing.show(folder)
    _print(result, top)
    finish({**result, "trials": result["trials"][:top]})


def _submit(path: Path, setting: list[str], cluster: str, queue: str | None, flags: tuple[str, ...], follow: bool) -> None:
    """Submits the sweep to a cluster as a job, whose id is the sweep's name."""
    from heliostat.submit.submission import SubmissionRecord
    from heliostat.tune import sweep as sweeps

    with jobs_on(cluster) as jobs:
        plan = sweeps.load(path, setting, jobs.there.file)
        job = checked(sweeps.base_file(plan.sweep), sweeps.settings(plan.sweep.set_), jobs.there)
        whole = {k: v for k, v in plan.sweep.dump().items() if k != "set"}  # the job already has these settings
        record = SubmissionRecord(plan.sweep.name, cluster, str(plan.folder), plan.trials or 0, job.dump(), queue, whole)
        send(jobs, record, flags, follow)


def _carry(folder: str, big: Path) -> dict[str, object]:
    from dataclasses import asdict

    from heliostat.storage.locations import Location
    from heliostat.tune import listing, transfer
    from heliostat.tune.trial_record import read

    plan, _ = listing.read(Location(folder))
    result, path = transfer.carry(plan, read(plan.folder), transfer.check(plan, big), big)
    for line in transfer.tell(result):
        out.print(line)
    out.print(f"the large job with this learning rate is in {path}")
    return {**asdict(result), "job": str(path)}


def write_best(sweep: str) -> Path:
    """Writes the job of a sweep's best trial to a file next to the sweep, or in the workspace if the sweep is on S3."""
    import logging

    import yaml

    from heliostat.tune import listing

    folder = listing.find(sweep, DEFAULT_STORAGE)
    job = listing.best_job(folder)
    path = Path(f"{job['name']}.yaml") if folder.is_s3 else Path(folder.path) / f"{job['name']}.yaml"
    try:
        path.write_text(yaml.safe_dump(job, sort_keys=False))
    except OSError as e:
        raise ConfigError(f"{path}: can't write the job of the best trial ({e.strerror}). Check the folder's permissions") from e
    logging.getLogger("heliostat").info("the job of the best trial is in %s", path)
    return path


def _print(result: SweepProgress, top: int) -> None:
    from heliostat.tune import report

    print_table(report.cells(result["trials"][:top]), left=())
    out.print(f"{result['steps']:,} steps in {len(result['trials'])} trials, {result['seconds']:,.0f} s")
    if best := result["best"]:
        model = f", model {best['model_uri']}" if best.get("model_uri") else ""
        out.print(f"best: trial {best['trial']}, {result['metric']} {best['value']:.4g}, run {best['run_id']}{model}")
        out.print(f"\nNext:  {shlex.quote(program())} train --from-sweep {shlex.quote(result['folder'])} --best")
