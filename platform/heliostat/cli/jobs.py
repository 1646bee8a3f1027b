"""Submits and manages jobs on clusters: `heliostat submit`, `heliostat job` list, status, logs, stop, resume.

Exit codes of commands that follow a job: 0: succeeded, 1: failed, 2: invalid input, 130: stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from heliostat.cli import completion
from heliostat.cli.common import command, finish, out, print_table
from heliostat.cli.groups import JOB, TOP
from heliostat.cli.options import Follow, JobFile, Overwrite, Queue, Resume, Settings, Target, argument, flag
from heliostat.errors import ConfigError, HeliostatError
from heliostat.terminal import duration

if TYPE_CHECKING:
    from heliostat.cluster.endpoint import Endpoint
    from heliostat.config.spec import Job
    from heliostat.submit.jobs import Jobs, Submitted
    from heliostat.submit.progress import RunProgress
    from heliostat.submit.submission import SubmissionRecord

Id = Annotated[str, argument("ID", "The job's id, which is the name of the run", completion.jobs)]


def recorded(job_id: str) -> SubmissionRecord | None:
    """Reads this workspace's record of a submitted job; None if the workspace submitted no job with this id."""
    from heliostat.submit.submission import SubmissionRecord

    return SubmissionRecord.read(job_id)


@contextmanager
def jobs_on(cluster: str | None, record: SubmissionRecord | None = None, field: str = "--cluster") -> Iterator[Jobs]:
    """Connects to the jobs of `cluster`, by default the cluster in the record. `field`: the option that begins the error
    messages."""
    from heliostat.cluster.endpoint import endpoint
    from heliostat.submit.jobs import Jobs

    with endpoint(cluster or (record.cluster if record else None), field) as endpoint_:
        yield Jobs(endpoint_)


@command(TOP, example="jobs/quickstart.yaml --cluster clusters/local.yaml")
def submit(
    job: JobFile,
    cluster: Target = None,
    follow: Follow = False,
    setting: Settings = None,
    queue: Queue = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Send a job to a cluster. Checks and plans the job first, and sends the workspace's files with the job."""
    from heliostat.storage.run_folder import require_one_way
    from heliostat.submit.submission import SubmissionRecord

    require_one_way(resume, overwrite)
    flags = (["--resume"] if resume else []) + (["--overwrite"] if overwrite else [])
    with jobs_on(cluster) as jobs:
        wanted = checked(job, setting or [], jobs.there, resume)
        send(jobs, SubmissionRecord.of(wanted, cluster, queue), tuple(flags), follow)


def checked(file: Path, settings: list[str], endpoint_: Endpoint, resume: bool = False) -> Job:
    """Loads a job. Checks the job's paths, the job's plan on the cluster, and the services that this machine can reach.

    The returned job has its final parallelism configuration.
    """
    from heliostat.plan import auto
    from heliostat.plan import planner as planning
    from heliostat.submit import submission
    from heliostat.validation.check import check_job, check_services

    wanted = submission.load(file, settings, endpoint_, resume)
    device = None if endpoint_.here or endpoint_.file or not wanted.workers.gpus else auto.elsewhere()
    wanted = auto.settled(wanted, endpoint_.file, resume, device)
    planned, recipe, _ = planning.bound(*check_job(wanted))
    planning.plan(planned, recipe, endpoint_.file)
    if endpoint_.here:
        check_services(wanted)
    return wanted


def send(jobs: Jobs, wanted: SubmissionRecord, flags: tuple[str, ...], follow: bool) -> None:
    """Submits a job. With `follow`, shows the job's log until the job ends, and exits with a code for the job's outcome."""
    from heliostat.submit.jobs import exit_code

    job_id = jobs.submit(wanted, flags)
    if not follow:
        out.print(f"job {job_id} is on {jobs.there.url}; see `heliostat job status {job_id}`, "
                  f"`heliostat job logs {job_id} --follow`")  # fmt: skip
        finish({"id": job_id, "url": jobs.there.url, "run_folder": wanted.run_folder})
        return
    for text in jobs.follow(job_id):
        _write(text, sys.stderr if out.quiet else sys.stdout)
    ended = jobs.get(job_id)
    result: dict[str, object] = {"id": job_id, "status": ended["status"], "run_folder": wanted.run_folder}
    if code := exit_code(ended):
        result["error"] = {"type": "JobError", "message": ended["message"], "exit_code": code}
    finish(result)
    sys.exit(code)


@command(JOB, "list", example="--cluster clusters/local.yaml")
def jobs(cluster: Target = None) -> None:
    """List the jobs of a cluster."""
    with jobs_on(cluster) as known:
        result = known.list()
    print_table(_cells(result), left=range(4))
    finish({"jobs": result})


def _cells(jobs: list[Submitted]) -> list[list[str]]:
    rows = [["job", "status", "began", "queue"]]
    for j in jobs:
        began = datetime.fromtimestamp(j["started"]).isoformat(sep=" ", timespec="seconds") if j["started"] else ""
        rows.append([str(j["id"]), j["status"].lower(), began, j["metadata"].get("queue") or ""])
    return rows


@command(JOB, example="quickstart")
def status(id_: Id, cluster: Target = None) -> None:
    """Show a job's status, step, and remaining time."""
    result = _look(id_, cluster)
    result["progress"] = _progress(result["run_folder"], result["steps"], result.get("metadata", {}))
    p = result["progress"]
    share = "" if p["step"] is None else f", {p.get('unit', 'step')} {p['step']:,} of {p['steps']:,} ({p['fraction']:.0%})"
    ahead = f", about {duration(p['eta_s'])} to go" if p["eta_s"] and result["status"] == "RUNNING" else ""
    out.print(f"{id_}: {result['status'].lower()}{share}{ahead}; run {result['run_folder']}")
    for note in filter(None, (result["message"] if result["status"] != "RUNNING" else "", p.get("note"))):
        out.print(f"  {note}")
    finish(result)


def _progress(folder: str, steps: int, metadata: Mapping[str, str]) -> RunProgress:
    from heliostat.storage.locations import Location
    from heliostat.submit import progress

    return progress.of_sweep(Location(folder)) if metadata.get("kind") == "sweep" else progress.of_run(Location(folder), steps)


def _look(job_id: str, cluster: str | None) -> dict[str, Any]:
    """Returns a job's state as the job's cluster reports it. If the cluster no longer exists, returns the state in the local
    record."""
    record = recorded(job_id)
    try:
        with jobs_on(cluster, record) as known:
            result = known.get(job_id)
        return {**result, "run_folder": result["metadata"]["run"], "steps": int(result["metadata"]["steps"])}
    except HeliostatError as e:
        if record is None:
            raise
        kept = {"run_folder": record.run_folder, "steps": record.steps, "metadata": {"kind": "sweep"} if record.sweep else {}}
        return {"id": job_id, "status": "UNKNOWN", "message": str(e), **kept}


@command(JOB, example="quickstart --follow", reports=False)
def logs(id_: Id, follow: Follow = False, cluster: Target = None) -> None:
    """Show a job's log: from its cluster, or from storage if the cluster is gone."""
    from heliostat.storage.locations import Location
    from heliostat.submit.jobs import exit_code
    from heliostat.submit.logs import stored

    record, code = recorded(id_), 0
    try:
        with jobs_on(cluster, record) as jobs:
            jobs.get(id_)
            for text in jobs.follow(id_) if follow else [jobs.logs(id_)]:
                _write(text)
            code = exit_code(jobs.get(id_)) if follow else 0
    except HeliostatError:
        kept = stored(Location(record.run_folder)) if record else None
        if kept is None:
            raise
        _write(kept)
    sys.exit(code)


def _write(text: str, to: TextIO | None = None) -> None:
    to = to or sys.stdout
    to.write(text)
    to.flush()


@command(JOB, example="quickstart")
def stop(
    id_: Id, now: Annotated[bool, flag("--now", help="Don't wait for a checkpoint")] = False, cluster: Target = None
) -> None:
    """Stop a job. The job saves a checkpoint first, unless you pass --now."""
    from heliostat.storage import retries

    with jobs_on(cluster, recorded(id_)) as jobs:
        stopped = jobs.stop(id_, now)
    with retries.limited(3) if now else nullcontext():  # --now may be used because a store doesn't answer
        p = _progress(stopped["metadata"]["run"], int(stopped["metadata"]["steps"]), stopped["metadata"])
    at = f" ({p['note']})" if p["step"] is None else f" at {p.get('unit', 'step')} {p['step']}"
    out.print(f"{id_}: {stopped['status'].lower()}{at}; resume it with `heliostat job resume {id_}`")
    finish({**stopped, "progress": p})


@command(JOB, example="quickstart --set workers.count=4")
def resume(id_: Id, cluster: Target = None, follow: Follow = False, setting: Settings = None) -> None:
    """Submit a job again, to resume from the job's last checkpoint. --set changes keys such as workers.count."""
    from heliostat.submit.submission import changed

    record = recorded(id_)
    if record is None:
        raise ConfigError(f"{id_}: wasn't submitted from this workspace. Run: heliostat submit JOB.yaml --resume")
    with jobs_on(cluster, record) as jobs:
        send(jobs, changed(record, setting or [], cluster or record.cluster), ("--resume",), follow)
