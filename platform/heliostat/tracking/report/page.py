"""Builds a self-contained HTML page about a run: curves, goodput, restarts, samples, and lineage. The page loads no other file.

    html = page(gather(client, run))

When a run ends, it gets the page as an artifact (`report.html`), which MLflow's UI shows. `heliostat run report` also writes
the page. `metrics.METRICS` declares the page's curves and charts. All text from outside is escaped.
"""

from __future__ import annotations

import math
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, TypedDict

from heliostat.recipes.auditing import MaskAudit
from heliostat.runs import goodput
from heliostat.tracking import lineage, lineage_lines, run_table
from heliostat.tracking.metrics import METRICS, SPIKE, SPIKE_LIMIT, Metric, metric_of, renamed
from heliostat.tracking.mlflow_client import read_json
from heliostat.tracking.report import conversations, galleries, svg
from heliostat.tracking.report.frame import boxes, document, side_by_side, table

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import Run

FILE = "report.html"
SPIKES = 20  # maximum number of spikes in the list (the newest)
OUTCOMES = {"finished": "#31a354", "failed": "#de2d26", "interrupted": "#fd8d3c", "preempted": "#fdae6b", "resize": "#6baed6"}
Curves = dict[str, svg.Points]


class PageFacts(TypedDict):
    """Holds the facts that the report page shows."""

    row: run_table.RunRow
    node: lineage.Traced
    spikes: list[tuple[int, float, float]]  # step, loss, limit
    curves: Curves
    goodput: goodput.GoodputReport | None
    samples: list[tuple[str, str]]  # prompt, text
    pictures: list[galleries.Series]
    masks: MaskAudit | None
    answers: list[conversations.StepAnswers]


def gather(client: MlflowClient, run: Run) -> PageFacts:
    """Collects the facts for the report page from MLflow and the run's folder, as plain data."""
    run_id = run.info.run_id
    samples = (read_json(client, run_id, "samples.json", dict[str, list[list[str]]]) or {}).get("data", [])
    return {
        "row": run_table.row(run, client.get_experiment(run.info.experiment_id).name),
        "node": lineage.run_node(client, run),
        "spikes": _spikes(client, run_id),
        "curves": _curves(client, run),
        "goodput": lineage.goodput_of(client, run),
        "samples": [(row[0], row[1]) for row in samples],
        "pictures": galleries.gather(client, run_id),
        "masks": conversations.audit_of(client, run_id),
        "answers": conversations.answers_of(client, run_id),
    }


def _curves(client: MlflowClient, run: Run) -> Curves:
    """Returns the (step, value) points of every metric that has a chart, by the metric's present name."""
    curves: Curves = {}
    for recorded in run.data.metrics:
        metric = metric_of(name := renamed(recorded))
        if metric and metric.chart:
            history = client.get_metric_history(run.info.run_id, recorded)
            curves.setdefault(name, []).extend((m.step, m.value) for m in history)
    return {name: sorted(points) for name, points in curves.items()}


def _spikes(client: MlflowClient, run_id: str) -> list[tuple[int, float, float]]:
    loss, limit = ({m.step: m.value for m in client.get_metric_history(run_id, key)} for key in (SPIKE, SPIKE_LIMIT))
    return [(step, loss[step], limit.get(step, math.nan)) for step in sorted(loss)]


def page(facts: PageFacts) -> str:
    """Renders the report page as HTML."""
    row, report = facts["row"], facts["goodput"]
    parts = [
        f"<h1>{escape(row['name'])}</h1>",
        f"<p class='muted'>run {escape(row['run_id'])} of experiment {escape(row['experiment'])}</p>",
        _summary(row),
        "<h2>Curves</h2>",
        *_sections(facts["curves"]),
        *_spike_lines(facts["spikes"]),
    ]
    if report:
        parts.append("<h2>Where the time went</h2>")
        spans = svg.timeline("starts of the workers", [_span(i, a) for i, a in enumerate(report["attempts"], 1)])
        parts.append(side_by_side([svg.waterfall(f"goodput {report['goodput']:.1%}", report["parts"], goodput.COLOURS), spans]))
    parts += _samples(facts["samples"], facts["pictures"])
    parts += conversations.answer_section(facts["answers"])
    parts += conversations.mask_section(facts["masks"])
    traced = lineage_lines.lines({"model": None, "run": facts["node"]})
    tree = "".join(f"<div style='margin-left:{14 * depth}px'>{escape(text)}</div>" for depth, text in traced)
    parts += ["<h2>Lineage</h2>", f"<div class='tree'>{tree}</div>"]
    for model in facts["node"]["models"]:
        aliases = " ".join("@" + a for a in model["aliases"])
        parts.append(f"<p>model <b>{escape(model['uri'])}</b> {escape(aliases)}</p>")
    return document(row["name"], parts)


def _summary(row: run_table.RunRow) -> str:
    def when(at: float) -> str:
        return datetime.fromtimestamp(at).astimezone().isoformat(sep=" ", timespec="seconds")

    shown = {
        "status": row["status"],
        "step": f"{row['step']:,}" + (f" of {row['steps']:,}" if row["steps"] else ""),
        "training loss": row["train_loss"],
        "held-out loss": row["eval_loss"],
        "tokens or samples/s": f"{row['per_second']:,.0f}" if row["per_second"] else None,
        "goodput": f"{row['goodput']:.1%}" if row["goodput"] is not None else None,
        "worker-hours": row["worker_hours"],
        "began": when(row["started"]),
        "ended": when(row["ended"]) if row["ended"] else None,
    }
    cells = {k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in shown.items() if v not in (None, "")}
    reason = f"<div class='wide'><dt>reason</dt><dd>{escape(row['reason'])}</dd></div>" if row["reason"] else ""
    first = {"status": cells.pop("status")}
    return f"<dl>{boxes(first)}{reason}{boxes(cells)}</dl>"


def _sections(curves: Curves) -> list[str]:
    """Draws the charts of each section below its heading, in the order of METRICS."""
    last = max((points[-1][0] for points in curves.values() if points), default=0.0)
    out = []
    for section in dict.fromkeys(m.section for m in METRICS):
        charts: dict[str, tuple[str, list[svg.Curve]]] = {}
        for metric, name in ((m, n) for m in METRICS if m.section == section for n in sorted(curves) if metric_of(n) is m):
            charts.setdefault(_title(metric, name), (metric.unit, []))[1].append(svg.Curve(name, curves[name], metric.mark))
        drawn = [svg.lines(title, shown, (0.0, last), unit) for title, (unit, shown) in charts.items()]
        if any(drawn):
            out += [f"<h3>{section}</h3>", side_by_side(drawn)]
    return out


def _title(metric: Metric, name: str) -> str:
    if "{}" not in metric.chart:
        return metric.chart
    title = metric.chart.replace("{}", (metric.star(name) or "").replace("_", " "))
    return title[:1].upper() + title[1:]


def _spike_lines(spikes: list[tuple[int, float, float]]) -> list[str]:
    if not spikes:
        return []
    rows = [[f"{step:,}", f"{loss:.6g}", f"{limit:.6g}"] for step, loss, limit in spikes[-SPIKES:]]
    older = f"<p class='muted'>and {len(spikes) - SPIKES:,} earlier spikes</p>" if len(spikes) > SPIKES else ""
    return [f"<h2>Loss spikes: {len(spikes):,}</h2>{table(['step', 'loss', 'limit'], rows)}{older}"]


def _span(number: int, a: goodput.AttemptStart) -> tuple[float, float, str, str]:
    why = f": {a['reason']}" if a.get("reason") else ""
    span = f"steps {a['start_step'] + 1:,} to {a['reached']:,} on {a['workers']} workers"
    text = f"{number}: {span}, {a['outcome'] or 'no end'}{why}"
    return a["started"], a["started"] + a["seconds"], OUTCOMES.get(a["outcome"] or "", "#969696"), text


def _samples(texts: list[tuple[str, str]], pictures: list[galleries.Series]) -> list[str]:
    if not texts and not pictures:
        return []
    parts = [f"<p><b>{escape(prompt)}</b></p><pre>{escape(text)}</pre>" for prompt, text in texts]
    return ["<h2>Samples</h2>", *parts, side_by_side(galleries.figures(pictures)) if pictures else ""]
