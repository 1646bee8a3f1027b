"""Lists runs in a table, newest first: how each stands, what it reached, and what it cost."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from heliostat.tracking import mlflow_client, tags
from heliostat.tracking.metrics import latest
from heliostat.tracking.reconcile import settle

COLUMNS = ("run", "name", "status", "began", "step", "loss", "held-out", "rate", "goodput", "hours")


def rows(client: Any, experiment: str | None) -> list[dict[str, Any]]:
    """Builds a row for each run that heliostat made; those whose driver has died are settled first."""
    names = mlflow_client.experiments(client, experiment)
    return [row(settle(client, run), names[run.info.experiment_id]) for run in mlflow_client.runs(client, list(names))]


def row(run: Any, experiment: str) -> dict[str, Any]:
    """Describes a run as a row of the table.

    `worker_hours` is what the run cost: workers times hours, over all its attempts.
    """
    metrics, told, params = latest(run.data.metrics), run.data.tags, run.data.params
    at = {m.key: m.step for m in run.data.to_proto().metrics}
    return {
        "run_id": run.info.run_id,
        "name": told[tags.NAME],
        "experiment": experiment,
        "status": run.info.status,
        "reason": told.get(tags.REASON),
        "started": run.info.start_time / 1000,
        "ended": run.info.end_time / 1000 if run.info.end_time else None,
        "step": at.get("train/loss", 0),
        "steps": int(steps) if (steps := told.get(tags.STEPS, params.get("train.steps"))) else None,
        "train_loss": metrics.get("train/loss"),
        "eval_loss": metrics.get("eval/loss"),
        "per_second": metrics.get("train/tokens_per_second"),
        "goodput": metrics.get("train/time/goodput"),
        "worker_hours": metrics.get("train/time/worker_hours"),
        "gpus": float(params.get("workers.gpus", 0)),
        "sweep": told.get(tags.PARENT_RUN),
    }


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Formats the rows as text, with the columns' names first."""
    return [list(COLUMNS), *(_cells(r) for r in rows)]


def _cells(r: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    began = datetime.fromtimestamp(r["started"]).isoformat(sep=" ", timespec="minutes")
    step = f"{r['step']:,}/{r['steps']:,}" if r["steps"] else f"{r['step']:,}"
    return [r["run_id"], ("  " if r["sweep"] else "") + r["name"], r["status"], began, step, number(r["train_loss"], ".4f"),
            number(r["eval_loss"], ".4f"), number(r["per_second"], ",.0f"), number(r["goodput"], ".1%"),
            number(r["worker_hours"], ".3f")]  # fmt: skip
