"""Formats the report of a simulation as tables and sentences."""

from __future__ import annotations

from typing import Any

from heliostat.curation.simulation.requests import FIRST, SPREAD
from heliostat.terminal import duration
from heliostat.text import plural

HOUR_S = 3600
KINDS = ["tasks of kind", "tasks", "begin", "time", "CPU", "CPUs busy", "mean", "longest"]
REQUESTS = ["prefix", "prefixes", "requests", "per second and prefix, at most"]


def of_kinds(report: dict[str, Any]) -> list[list[str]]:
    rows = [KINDS]
    for kind in report["kinds"]:
        hours = (duration(kind[f"{name}_hours"] * HOUR_S) for name in ("begin", "wall", "cpu"))
        seconds = (duration(kind[name]) for name in ("mean_s", "longest_s"))
        rows.append([kind["kind"], f"{kind['tasks']:,}", *hours, f"{kind['busy']:.0%}", *seconds])
    return rows


def of_requests(report: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each prefix, or one for all folders in a folder: their requests, and the largest rate of one of them."""
    folders = dict[str, list[dict[str, float]]]()
    for prefix, of in report["requests"].items():
        above, slash, last = prefix.rpartition("/")
        folders.setdefault(f"{above}/*" if slash and last.isdigit() else prefix, []).append(of)
    return [REQUESTS, *([name, f"{SPREAD if name.endswith(FIRST) else len(some):,}", f"{sum(of['total'] for of in some):,}",
                         f"{max(of['per_second'] for of in some):,.0f}"] for name, some in folders.items())]  # fmt: skip


def explain(report: dict[str, Any]) -> list[str]:
    driver, failures, read = report["driver"], report["failures"], report["input"]
    wall, bound = duration(report["wall_hours"] * HOUR_S), duration(report["bound_hours"] * HOUR_S)
    return [
        f"{report['name']}: {read['bytes']:,} bytes in {plural(read['files'], 'file')} on {report['cpus']:,} CPUs of "
        f"{report['nodes']:,} nodes, simulated from a sample of {report['sample']['bytes']:,} bytes",
        f"time: {wall}, {report['times_bound']:.2f} times the {bound} that the CPUs need; "
        f"{report['cost']:,.0f} {report['currency']} by the plan's price table",
        *_fetching(report["fetching"]),
        f"driver: busy {driver['busy']:.0%} of the time, {driver['seconds_per_task'] * 1e6:,.0f} microseconds per Ray task; "
        f"{driver['memory_bytes'] / 1e6:,.0f} MB of memory",
        *_dispatchers(driver),
        f"dataset: {report['rows']:,} row groups, which each reader of the dataset keeps in memory",
        f"failures: {failures['lost']:,} tasks lost with their node, {failures['poisoned']:,} ended by a document, "
        f"{failures['slow']:,} slow, and {failures['repeated']:,} Ray tasks repeated on another node; "
        f"{failures['recorded']:,} tasks have a record",
    ]


def _dispatchers(driver: dict[str, Any]) -> list[str]:
    count = driver["dispatchers"]
    return (
        [f"dispatchers: {count} processes that start Ray tasks, busy {driver['dispatchers_busy']:.0%} of the time"]
        if count
        else []
    )


def _fetching(web: dict[str, Any] | None) -> list[str]:
    if web is None:
        return []
    times = ", ".join(f"{share} after {duration(hours * HOUR_S)}" for share, hours in web["hours"].items())
    limits = ", ".join(f"{name} {share:.0%}" for name, share in sorted(web["limits"].items(), key=lambda item: -item[1]))
    return [
        f"URLs: {web['urls']:,} of about {web['hosts']:,} hosts, {web['bytes']:,} bytes of images; the largest host has about "
        f"{web['largest_host']:,} URLs",
        f"URLs fetched at {web['per_second']:g} requests per second to each host, without other limits: {times}",
        f"limits of fetching tasks, by their time: {limits}",
    ]
