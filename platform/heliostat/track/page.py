"""One self-contained HTML page about a run: curves, goodput, restarts, samples, lineage. It needs no network and no script.

    html = page(gather(client, run))

It is an artifact of every run that ends (`report.html`), which MLflow's UI shows, and what `heliostat report` writes.
"""

from __future__ import annotations

import base64
import math
import tempfile
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from heliostat.errors import HeliostatError
from heliostat.runs import goodput
from heliostat.storage import Location
from heliostat.track import lineage, run_table, svg
from heliostat.track.metrics import SPIKE, SPIKE_LIMIT
from heliostat.track.mlflow_client import FOLDER
from heliostat.track.run_facts import read_json

FILE = "report.html"
CURVES = ("train/loss", "eval/loss", "train/router_loss", "train/tokens_per_second", "train/lr", "train/grad_norm")
SPIKES = 20  # the newest, that are listed
PICTURES, PICTURE_BYTES = 6, 2 << 20  # the newest, and the largest that is shown
OUTCOMES = {"finished": "#31a354", "failed": "#de2d26", "interrupted": "#fd8d3c", "preempted": "#fdae6b", "resize": "#6baed6"}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1360px;margin:2em auto;padding:0 1em}h1{margin-bottom:0}
h2{margin:1.6em 0 .4em;border-bottom:1px solid #ddd}table{border-collapse:collapse}td,th{padding:.2em .8em .2em 0;text-align:left;
vertical-align:top}figure{display:inline-block;width:640px;max-width:100%;margin:.5em 1em .5em 0;vertical-align:top}
figcaption{font-weight:600}svg{width:100%;font:11px system-ui,sans-serif}.grid{stroke:#e5e5e5}.label{fill:#888}
pre{white-space:pre-wrap;background:#f7f7f7;padding:.6em;margin:.2em 0}img{max-width:100%;image-rendering:pixelated}
.muted{color:#777}
"""


def gather(client: Any, run: Any) -> dict[str, Any]:
    """What the page shows, as plain data."""
    run_id = run.info.run_id
    report = read_json(client, run_id, "goodput.json")
    if report is None:
        try:
            report = goodput.read_report(Location(run.data.tags[FOLDER]))
        except (HeliostatError, OSError):
            report = None
    samples = read_json(client, run_id, "samples.json") or {"data": []}
    return {
        "row": run_table.row(run, client.get_experiment(run.info.experiment_id).name),
        "node": lineage.run_node(client, run),
        "spikes": _spikes(client, run_id),
        "curves": {key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)] for key in CURVES},
        "goodput": report,
        "samples": [(row[0], row[1]) for row in samples["data"]],
        "pictures": _pictures(client, run_id),
    }


def _spikes(client: Any, run_id: str) -> list[tuple[int, float, float]]:
    """(step, loss, limit) of the loss spikes, in order."""
    loss, limit = ({m.step: m.value for m in client.get_metric_history(run_id, key)} for key in (SPIKE, SPIKE_LIMIT))
    return [(step, loss[step], limit.get(step, math.nan)) for step in sorted(loss)]


def _pictures(client: Any, run_id: str) -> list[tuple[str, bytes]]:
    """(name, PNG) of the newest images of each kind."""
    found = []
    for kind in client.list_artifacts(run_id, "images"):
        small = [f.path for f in client.list_artifacts(run_id, kind.path) if (f.file_size or 0) <= PICTURE_BYTES]
        found += sorted(small)[-1:]
    with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
        return [(path, Path(client.download_artifacts(run_id, path, folder)).read_bytes()) for path in found[:PICTURES]]


def page(facts: dict[str, Any]) -> str:
    row, report = facts["row"], facts["goodput"]
    parts = [
        f"<h1>{escape(row['name'])}</h1><p class='muted'>run {row['run_id']} of experiment {escape(row['experiment'])}</p>",
        _summary(row),
        "<h2>Curves</h2>",
        *_charts(facts["curves"]),
        *_spike_lines(facts["spikes"]),
    ]
    if report:
        parts.append("<h2>Where the time went</h2>")
        parts.append(svg.waterfall(f"goodput {report['goodput']:.1%}", report["parts"], goodput.COLOURS))
        parts.append(svg.timeline("starts of the workers", [_span(i, a) for i, a in enumerate(report["attempts"], 1)]))
    parts += _samples(facts["samples"], facts["pictures"])
    parts += ["<h2>Lineage</h2>", _tree(lineage.lines({"model": None, "run": facts["node"]}))]
    for model in facts["node"]["models"]:
        aliases = " ".join("@" + a for a in model["aliases"])
        parts.append(f"<p>model <b>{escape(model['uri'])}</b> {escape(aliases)}</p>")
    head = f"<meta charset='utf-8'><title>{escape(row['name'])}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def _summary(row: dict[str, Any]) -> str:
    told = {
        "status": row["status"] + (f": {row['reason']}" if row["reason"] else ""),
        "began": datetime.fromtimestamp(row["started"]).isoformat(sep=" ", timespec="seconds"),
        "ended": datetime.fromtimestamp(row["ended"]).isoformat(sep=" ", timespec="seconds") if row["ended"] else "",
        "step": f"{row['step']:,}" + (f" of {row['steps']:,}" if row["steps"] else ""),
        "training loss": row["train_loss"],
        "held-out loss": row["eval_loss"],
        "worker-hours": row["worker_hours"],
    }
    cells = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in told.items() if v not in (None, "")}
    return "<table>" + "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in cells.items()) + "</table>"


def _charts(curves: dict[str, list[tuple[float, float]]]) -> list[str]:
    def of(*keys: str) -> dict[str, list[tuple[float, float]]]:
        return {key: sorted(curves[key]) for key in keys}

    return [
        svg.lines("Loss", of("train/loss", "eval/loss")),
        *([svg.lines("Router's loss of the experts", of("train/router_loss"))] if curves["train/router_loss"] else []),
        svg.lines("Throughput, tokens or samples a second", of("train/tokens_per_second")),
        svg.lines("Learning rate", of("train/lr")),
        svg.lines("Gradient norm", of("train/grad_norm")),
    ]


def _spike_lines(spikes: list[tuple[int, float, float]]) -> list[str]:
    if not spikes:
        return []
    rows = "".join(f"<tr><td>{step:,}</td><td>{loss:.6g}</td><td>{limit:.6g}</td></tr>" for step, loss, limit in spikes[-SPIKES:])
    older = f"<p class='muted'>and {len(spikes) - SPIKES:,} before them</p>" if len(spikes) > SPIKES else ""
    head = "<tr><th>step</th><th>loss</th><th>limit</th></tr>"
    return [f"<h2>Loss spikes: {len(spikes):,}</h2><table>{head}{rows}</table>{older}"]


def _span(number: int, a: dict[str, Any]) -> tuple[float, float, str, str]:
    why = f": {a['reason']}" if a.get("reason") else ""
    span = f"steps {a['start_step'] + 1:,} to {a['reached']:,} on {a['workers']} workers"
    text = f"{number}: {span}, {a['outcome'] or 'no end'}{why}"
    return a["started"], a["started"] + a["seconds"], OUTCOMES.get(a["outcome"] or "", "#969696"), text[:110]


def _samples(texts: list[tuple[str, str]], pictures: list[tuple[str, bytes]]) -> list[str]:
    if not texts and not pictures:
        return []
    parts = [f"<p><b>{escape(prompt)}</b></p><pre>{escape(text)}</pre>" for prompt, text in texts]
    for name, png in pictures:
        image = f"<img alt='{escape(name)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
        parts.append(f"<figure><figcaption>{escape(name)}</figcaption>{image}</figure>")
    return ["<h2>Samples</h2>", *parts]


def _tree(lines: list[tuple[int, str]]) -> str:
    return "".join(f"<div style='margin-left:{1.6 * depth:g}em'>{escape(text)}</div>" for depth, text in lines)
