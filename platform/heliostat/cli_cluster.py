"""`heliostat cluster ...`, and jobs on clusters: submit, jobs, status, logs, stop, resume.

Exit codes of commands that follow a job: 0 succeeded, 1 failed, 2 bad input, 130 stopped.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from heliostat.cli import Json, Settings, _finish, app, out
from heliostat.errors import ConfigError, HeliostatError

if TYPE_CHECKING:
    from heliostat.cluster.endpoint import Endpoint
    from heliostat.config.spec import Job
    from heliostat.submit.jobs import Jobs, Record

cluster_app = typer.Typer(no_args_is_help=True, help="Clusters from YAML: check, up, down, status, list.")
app.add_typer(cluster_app, name="cluster")

Target = Annotated[str | None, typer.Option("--cluster", "-c", help="A cluster file, an address, or a local cluster's name")]
File = Annotated[Path, typer.Argument(help="A cluster file (clusters/*.yaml)")]
Id = Annotated[str, typer.Argument(help="The job's id: its run's name")]
Queue = Annotated[str | None, typer.Option(help="Jobs of one queue run one after another")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show the log until the job is over; its outcome is the exit code")]


@cluster_app.command("check")
def check_(
    file: File, job: Annotated[Path | None, typer.Option(help="Also: does this job fit, and do its stores answer")] = None,
    setting: Settings = None, json_: Json = False,
) -> None:  # fmt: skip
    """Find what is wrong with a cluster file: schema, sizes, secrets, open ports, what would fail at the first real start."""
    from heliostat.cluster import pods
    from heliostat.cluster import review as checks

    report = checks.check(file)
    warnings = report.warnings
    if job and not report.errors:
        from heliostat.check import check_services
        from heliostat.plan import planner as planning

        wanted, recipe, _ = planning.prepare(job, setting)
        planning.plan(wanted, recipe, report.cluster)
        check_services(wanted)
        warnings = [*warnings, *pods.grace(report.cluster, wanted)]
    if not json_:
        for warning in warnings:
            out.print(f"warning: {warning}", markup=False)
        for error in report.errors:
            out.print(f"error: {error}", markup=False)
        for pool in report.cluster.pools if not report.errors else ():
            size = f"{pool.least}" if pool.least == pool.most else f"{pool.least} to {pool.most}"
            labels = ", ".join(f"{k}={v}" for k, v in pool.labels.items())
            cpus = "CPUs as found" if pool.cpus is None else f"{pool.cpus:g} CPUs"
            out.print(f"{pool.name}: {size} nodes of {cpus}, {pool.gpus:g} GPUs{'; ' + labels if labels else ''}", markup=False)
    _finish({"file": str(file), "errors": report.errors, "warnings": warnings}, json_)
    if report.errors:
        raise ConfigError(f"{file}: {len(report.errors)} error{'s' * (len(report.errors) > 1)}, see above")


@cluster_app.command()
def up(
    file: File,
    restart: Annotated[bool, typer.Option("--restart", help="Start Ray anew where it runs; this ends the jobs there")] = False,
    json_: Json = False,
) -> None:
    """Start a cluster, or join one that runs: processes on this machine, `ray up`, or `kubectl apply`."""
    from heliostat.cluster import launch, review

    cluster = review.require(file)
    found = launch.up(cluster, restart)
    if not json_:
        out.print(f"cluster {cluster.name}: {found['note']}", markup=False)
    _finish(found, json_)


@cluster_app.command()
def down(target: Annotated[str, typer.Argument(help="A cluster file, or a local cluster's name")], json_: Json = False) -> None:
    """Stop a cluster. A local one leaves no process; one that was only joined stays."""
    from heliostat.cluster import launch

    found = launch.down(target)
    if not json_:
        out.print(f"cluster {found['name']}: {found['note']}", markup=False)
    _finish(found, json_)


@cluster_app.command("status")
def status_(
    target: Annotated[str | None, typer.Argument(help="A cluster file, an address or a name")] = None, json_: Json = False
) -> None:
    """Show a cluster's nodes, what they have, and its jobs."""
    from heliostat.cluster import dashboard
    from heliostat.cluster.endpoint import endpoint
    from heliostat.submit.jobs import Jobs

    with endpoint(target) as there:
        nodes, jobs = dashboard.node_table(there.url, there.token), Jobs(there).list()
    if not json_:
        out.print(f"{there.url}: {sum(n['alive'] for n in nodes)} nodes", markup=False)
        for n in nodes:
            labels = ", ".join(f"{k}={v}" for k, v in sorted(n["labels"].items()) if k != "ray.io/node-id")
            role, life = "head" if n["head"] else "worker", "alive" if n["alive"] else "dead"
            out.print(f"  {n['address']:<15} {role:<6} {life:<5} {n['cpus']:g} CPUs, {n['gpus']:g} GPUs  "
                      f"{labels}", markup=False)  # fmt: skip
        for j in jobs:
            out.print(f"  job {j['id']}: {j['status'].lower()}", markup=False)
    _finish({"url": there.url, "nodes": nodes, "jobs": jobs}, json_)


@cluster_app.command("list")
def list_(json_: Json = False) -> None:
    """List the local clusters of this workspace."""
    from heliostat.cluster import dashboard, local, private

    found = [
        {"name": s.name, "url": s.url, "nodes": len(s.nodes),
         "answers": private.ours(s.url) and dashboard.probe(s.url, s.token) == 200} for s in local.known()
    ]  # fmt: skip
    if not json_:
        for c in found:
            what = f"{c['nodes']} nodes" if c["nodes"] else "joined"
            out.print(f"{c['name']}: {c['url']}, {what}{'' if c['answers'] else ', does not answer'}", markup=False)
        if not found:
            out.print("no local cluster; start one with `heliostat cluster up clusters/local.yaml`")
    _finish({"clusters": found}, json_)


# jobs --------------------------------------------------------------------------------------------------------------------


@app.command()
def submit(
    job: Path,
    cluster: Target = None,
    follow: Follow = False,
    setting: Settings = None,
    queue: Queue = None,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last checkpoint, if there is one")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete the run of this name and start anew")] = False,
    json_: Json = False,
) -> None:
    """Send a job to a cluster: the workspace and heliostat travel, the id is the run's name. Plans and checks first."""
    from heliostat.cluster.endpoint import endpoint
    from heliostat.submit import jobs as api

    flags = (["--resume"] if resume else []) + (["--overwrite"] if overwrite else [])
    with endpoint(cluster) as there:
        wanted = checked(job, setting or [], there)
        send(api.Jobs(there), api.Record.of(wanted, cluster, queue), tuple(flags), follow, json_)


def checked(file: Path, settings: list[str], there: Endpoint) -> Job:
    """The job, of which everything was checked that can be from here: its paths, its plan on the cluster, its services."""
    from heliostat.check import check_services
    from heliostat.plan import planner as planning
    from heliostat.submit import jobs as api

    wanted = api.load(file, settings, there)
    planned, recipe, _ = planning.prepare(file, settings)
    planning.plan(planned, recipe, there.file)
    if there.here:
        check_services(wanted)
    return wanted


def send(jobs: Jobs, wanted: Record, flags: tuple[str, ...], follow: bool, json_: bool) -> None:
    """Submits, and with `follow` shows the log until the job is over, whose outcome is then the exit code."""
    from heliostat.submit.jobs import exit_code

    job_id = jobs.submit(wanted, flags)
    if not follow:
        if not json_:
            out.print(f"job {job_id} is on {jobs.there.url}; see `heliostat status {job_id}`, `heliostat logs {job_id} --follow`")
        _finish({"id": job_id, "url": jobs.there.url, "run_folder": wanted.run_folder}, json_)
        return
    for text in jobs.follow(job_id):
        _write(text, sys.stderr if json_ else sys.stdout)
    found = jobs.get(job_id)
    _finish({"id": job_id, "status": found["status"], "run_folder": wanted.run_folder}, json_)
    sys.exit(exit_code(found))


@app.command()
def jobs(cluster: Target = None, json_: Json = False) -> None:
    """List a cluster's jobs."""
    from heliostat.cluster.endpoint import endpoint
    from heliostat.submit.jobs import Jobs

    with endpoint(cluster) as there:
        found = Jobs(there).list()
    if not json_:
        for j in found:
            began = datetime.fromtimestamp(j["started"]).isoformat(sep=" ", timespec="seconds") if j["started"] else ""
            queue = f"  queue {j['metadata']['queue']}" if j["metadata"].get("queue") else ""
            out.print(f"{j['id']:<24} {j['status'].lower():<10} {began}{queue}", markup=False)
    _finish({"jobs": found}, json_)


@app.command()
def status(id_: Id, cluster: Target = None, json_: Json = False) -> None:
    """Show how far a job is, and when it will be done."""
    found = _look(id_, cluster)
    found["progress"] = _progress(found["run_folder"], found["steps"], found.get("metadata", {}))
    if not json_:
        p = found["progress"]
        share = "" if p["step"] is None else f", {p.get('unit', 'step')} {p['step']:,} of {p['steps']:,} ({p['fraction']:.0%})"
        ahead = f", about {p['eta_s']:.0f} s to go" if p["eta_s"] and found["status"] == "RUNNING" else ""
        out.print(f"{id_}: {found['status'].lower()}{share}{ahead}; run {found['run_folder']}", markup=False)
        for note in filter(None, (found["message"] if found["status"] != "RUNNING" else "", p.get("note"))):
            out.print(f"  {note}", markup=False)
    _finish(found, json_)


def _progress(folder: str, steps: int, metadata: dict[str, Any]) -> dict[str, Any]:
    from heliostat.storage import Location
    from heliostat.submit import jobs as api

    return api.sweep_progress(Location(folder)) if metadata.get("kind") == "sweep" else api.progress(Location(folder), steps)


def _look(job_id: str, cluster: str | None) -> dict[str, Any]:
    """A job's state on its cluster; if that is gone, what is remembered."""
    from heliostat.cluster.endpoint import endpoint
    from heliostat.submit.jobs import Jobs, Record

    record = Record.read(job_id)
    try:
        with endpoint(cluster or (record.cluster if record else None)) as there:
            found = Jobs(there).get(job_id)
        return {**found, "run_folder": found["metadata"]["run"], "steps": int(found["metadata"]["steps"])}
    except HeliostatError as e:
        if record is None:
            raise
        kept = {"run_folder": record.run_folder, "steps": record.steps, "metadata": {"kind": "sweep"} if record.sweep else {}}
        return {"id": job_id, "status": "UNKNOWN", "message": str(e), **kept}


@app.command()
def logs(id_: Id, follow: Follow = False, cluster: Target = None) -> None:
    """Show a job's log: from the cluster, or from storage when the cluster is gone."""
    from heliostat.cluster.endpoint import endpoint
    from heliostat.storage import Location
    from heliostat.submit.jobs import Jobs, Record, exit_code
    from heliostat.submit.logs import stored

    record = Record.read(id_)
    code = 0
    try:
        with endpoint(cluster or (record.cluster if record else None)) as there:
            jobs = Jobs(there)
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


@app.command()
def stop(
    id_: Id,
    now: Annotated[bool, typer.Option(help="Do not wait for a checkpoint")] = False,
    cluster: Target = None,
    json_: Json = False,
) -> None:
    """Stop a job; it saves a checkpoint first, unless --now."""
    from heliostat.cluster.endpoint import endpoint
    from heliostat.storage import BUDGET
    from heliostat.submit.jobs import Jobs, Record

    record = Record.read(id_)
    with endpoint(cluster or (record.cluster if record else None)) as there:
        found = Jobs(there).stop(id_, now)
    if now:  # the store may be why
        os.environ[BUDGET] = "3"
    found["progress"] = _progress(found["metadata"]["run"], int(found["metadata"]["steps"]), found["metadata"])
    if not json_:
        p = found["progress"]
        at = f" ({p['note']})" if p["step"] is None else f" at {p.get('unit', 'step')} {p['step']}"
        out.print(f"{id_}: {found['status'].lower()}{at}; go on with `heliostat resume {id_}`", markup=False)
    _finish(found, json_)


@app.command()
def resume(id_: Id, cluster: Target = None, follow: Follow = False, setting: Settings = None, json_: Json = False) -> None:
    """Send a job again, to go on from its last checkpoint; --set may change what a resumed run may change, as workers.count."""
    from heliostat.cluster.endpoint import endpoint
    from heliostat.submit.jobs import Jobs, Record, changed

    record = Record.read(id_)
    if record is None:
        raise ConfigError(f"{id_}: was not submitted from this workspace; use `heliostat submit JOB.yaml --resume`")
    where = cluster or record.cluster
    with endpoint(where) as there:
        send(Jobs(there), changed(record, setting or [], where), ("--resume",), follow, json_)
