"""Formats a sweep's results: rows of plain data, a table, and two plots."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from heliostat.tune.space import number
from heliostat.tune.sweep import SweepPlan
from heliostat.tune.trial_record import TrialRecord, ranked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, object]  # a row in the table of trials: column -> value
COLOURS = {"finished": "#31a354", "pruned": "#9ecae1", "failed": "#de2d26"}


def rows(plan: SweepPlan, records: list[TrialRecord]) -> list[Row]:
    """Lists the trials as rows of plain data, the best first."""
    table = []
    for record in ranked(records, plan.sweep.mode):
        row: Row = {"trial": record.number, "status": record.status, "step": record.step, "steps": record.steps,
                    plan.sweep.metric: record.value, **record.params, "seconds": round(record.seconds, 1),
                    "run_id": record.run_id}  # fmt: skip
        if record.clones:
            row["clones"] = ", ".join(f"{c['from']}@{c['step']}" for c in record.clones)
        if record.reason:
            row["reason"] = record.reason.splitlines()[0]
        table.append(row)
    return table


def note(plan: SweepPlan) -> str:
    """Describes a sweep in Markdown, for MLflow's UI."""
    sweep = plan.sweep
    what = f"Sweep of `{sweep.job}`: {sweep.searcher.name} search for the {sweep.mode}imum of `{sweep.metric}` over"
    trials = "The trials are the child runs of this run, and the rows of `trials.json`."
    return f"{what} {', '.join(f'`{key}`' for key in sweep.space)}.\n\n{trials}"


def columns(rows: list[Row]) -> list[str]:
    """Lists the columns of all rows, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def cells(rows: list[Row]) -> list[list[str]]:
    """Formats the rows as text, after a row of column names. If the last parts of all keys differ, the column names are only
    these last parts."""
    names = [c for c in columns(rows) if c not in ("run_id", "steps", "reason")]
    short = {n: n.rpartition(".")[2] for n in names}
    if len(set(short.values())) < len(names):
        short = {n: n for n in names}
    return [[short[n] for n in names], *([_cell(row, n) for n in names] for row in rows)]


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if name == "step":
        return f"{value}/{row['steps']}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figures(plan: SweepPlan, records: list[TrialRecord]) -> dict[str, Figure]:
    """Plots each trial's curve, and parallel coordinates of the parameters and the metric.

    Returns the figures by file name; an empty mapping if no trial has reported.
    """
    reported = [r for r in records if r.reports]
    if not reported:
        return {}
    return {"history.png": _history(plan, reported), "parallel_coordinates.png": _parallel(plan, reported)}


def _figure(width: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4.5), layout="constrained")


def _history(plan: SweepPlan, records: list[TrialRecord]) -> Figure:
    figure = _figure(8)
    axes = figure.subplots()
    for record in records:
        axes.plot([s for s, *_ in record.reports], [v for _, v, _ in record.reports], marker="o", markersize=3,
                  color=COLOURS.get(record.status, "#969696"), label=f"trial {record.number}")  # fmt: skip
        step, value, _ = record.reports[-1]
        axes.annotate(str(record.number), (step, value), fontsize=7)
    axes.set_xlabel("step")
    axes.set_ylabel(plan.sweep.metric)
    axes.set_title(f"{plan.sweep.name}: " + ", ".join(f"{k} {c}" for k, c in Counter(r.status for r in records).items()))
    return figure


def _parallel(plan: SweepPlan, records: list[TrialRecord]) -> Figure:
    keys = list(plan.sweep.space)
    figure = _figure(max(5.0, 2.2 * (len(keys) + 1)))
    axes = figure.subplots()
    values = [r.value for r in records if r.value is not None and math.isfinite(r.value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    for record in records:
        places = [position(plan, key, record.params.get(key)) for key in keys]
        finite = record.value is not None and math.isfinite(record.value)
        last = (record.value - low) / (high - low) if finite and high > low else 0.5  # type: ignore[operator]
        axes.plot(range(len(keys) + 1), [*places, last], color=COLOURS.get(record.status, "#969696"), alpha=0.8)
    axes.set_xticks(range(len(keys) + 1), [*(k.rpartition(".")[2] for k in keys), plan.sweep.metric])
    axes.set_yticks([])
    for i, key in enumerate(keys):
        edges = plan.sweep.space[key].values
        axes.annotate(_short(edges[0]), (i, -0.06), ha="center", fontsize=7)
        axes.annotate(_short(edges[-1] if plan.sweep.space[key].listed else edges[1]), (i, 1.03), ha="center", fontsize=7)
    axes.annotate(f"{low:.4g}", (len(keys), -0.06), ha="center", fontsize=7)
    axes.annotate(f"{high:.4g}", (len(keys), 1.03), ha="center", fontsize=7)
    axes.set_ylim(-0.12, 1.12)
    axes.set_title(plan.sweep.name)
    return figure


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:12]


def position(plan: SweepPlan, key: str, value: object) -> float:
    """Computes a value's position on its axis, 0 to 1. Returns -0.1, below the axis, if the trial has no value for the key."""
    domain = plan.sweep.space[key]
    if value is None:
        return -0.1
    if domain.listed:
        return domain.values.index(value) / max(1, len(domain.values) - 1)
    low, high, at = *domain.numbers[:2], number(value)
    if "log" in domain.kind:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low)
