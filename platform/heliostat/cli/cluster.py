"""Starts, checks, and shows clusters: `heliostat cluster` check, up, down, status, list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli import completion
from heliostat.cli.common import command, finish, out
from heliostat.cli.groups import CLUSTER
from heliostat.cli.jobs import jobs_on
from heliostat.cli.options import Settings, argument, flag
from heliostat.errors import ConfigError
from heliostat.text import plural

File = Annotated[Path, argument("FILE", "A cluster file, such as clusters/local.yaml", completion.cluster_files)]


@command(CLUSTER, "check", example="clusters/aws-h100.yaml --job jobs/gpt-1b.yaml")
def check_(
    file: File,
    job: Annotated[
        Path | None,
        typer.Option(
            metavar="JOB",
            help="Check as well that this job fits on the cluster, and that the job's stores answer",
            autocompletion=completion.job_files,
        ),
    ] = None,
    setting: Settings = None,
) -> None:
    """Check a cluster file: schema, sizes, secrets, open ports, and errors that a real start would show."""
    from heliostat.cluster import pods
    from heliostat.cluster import review as checks

    report = checks.check(file)
    warnings = report.warnings
    if job and not report.errors:
        from heliostat.plan import auto
        from heliostat.plan import planner as planning
        from heliostat.validation.check import check_services

        wanted, recipe, _ = auto.prepared(job, setting, report.cluster)
        planning.plan(wanted, recipe, report.cluster)
        check_services(wanted)
        warnings = [*warnings, *pods.grace(report.cluster, wanted)]
    for warning in warnings:
        out.print(f"warning: {warning}")
    for error in report.errors:
        out.print(f"error: {error}")
    for pool in report.cluster.pools if not report.errors else ():
        size = "" if pool.least == pool.most else f"{pool.least} to "
        labels = ", ".join(f"{k}={v}" for k, v in pool.labels.items())
        cpus = "automatic CPUs" if pool.cpus is None else plural(pool.cpus, "CPU")
        nodes = f"{size}{plural(pool.most, 'node')} of {cpus}, {plural(pool.gpus, 'GPU')}"
        out.print(f"{pool.name}: {nodes}{'; ' + labels if labels else ''}")
    result = {"file": str(file), "errors": report.errors, "warnings": warnings}
    count = len(report.errors)
    finish(result, ConfigError(f"{file}: has {plural(count, 'error')}. Correct the errors above") if count else None)


@command(CLUSTER, example="clusters/local.yaml")
def up(
    file: File, restart: Annotated[bool, flag("--restart", help="If Ray runs already, restart Ray; this ends Ray's jobs")] = False
) -> None:
    """Start a cluster, or join a running one: processes on this machine, `ray up`, or `kubectl apply`."""
    from heliostat.cluster import launch, review

    cluster = review.require(file)
    result = launch.up(cluster, restart)
    out.print(f"cluster {cluster.name}: {result['note']}")
    finish(result)


@command(CLUSTER, example="clusters/local.yaml")
def down(target: Annotated[str, argument("CLUSTER", "A cluster file, or a local cluster's name", completion.clusters)]) -> None:
    """Stop a cluster. A local cluster leaves no process; a joined cluster keeps running."""
    from heliostat.cluster import launch

    result = launch.down(target)
    out.print(f"cluster {result['name']}: {result['note']}")
    finish(result)


@command(CLUSTER, "status", example="clusters/local.yaml")
def status_(
    target: Annotated[
        str | None,
        typer.Argument(help="A cluster file, an address, or a name", metavar="CLUSTER", autocompletion=completion.clusters),
    ] = None,
) -> None:
    """Show a cluster's nodes, the nodes' resources, and the cluster's jobs."""
    from heliostat.cluster import dashboard

    with jobs_on(target, field="CLUSTER") as known:
        endpoint = known.there
        nodes, jobs = dashboard.node_table(endpoint.url, endpoint.token), known.list()
    out.print(f"{endpoint.url}: {plural(sum(n['alive'] for n in nodes), 'node')}")
    for n in nodes:
        labels = ", ".join(f"{k}={v}" for k, v in sorted(n["labels"].items()) if k != "ray.io/node-id")
        role, life = "head" if n["head"] else "worker", "alive" if n["alive"] else "dead"
        out.print(f"  {n['address']:<15} {role:<6} {life:<5} {plural(n['cpus'], 'CPU')}, {plural(n['gpus'], 'GPU')}  "
                  f"{labels}")  # fmt: skip
    for j in jobs:
        out.print(f"  job {j['id']}: {j['status'].lower()}")
    finish({"url": endpoint.url, "nodes": nodes, "jobs": jobs})


@command(CLUSTER, "list", example="")
def list_() -> None:
    """List the local clusters of this workspace."""
    from heliostat.cluster import dashboard, local, private

    result = []
    for s in local.known():
        answers = private.ours(s.url) and dashboard.probe(s.url, s.token) == 200
        what = (plural(len(s.nodes), "node") if s.nodes else "joined") + ("" if answers else ", doesn't answer")
        out.print(f"{s.name}: {s.url}, {what}")
        result.append({"name": s.name, "url": s.url, "nodes": len(s.nodes), "answers": answers})
    if not result:
        out.print("no local cluster. Start one: heliostat cluster up clusters/local.yaml")
    finish({"clusters": result})
