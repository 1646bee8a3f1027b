"""Lists runs in a table, newest first, with status, step, scores, speed, goodput, and cost."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from heliostat.tracking import mlflow_client, tags
from heliostat.tracking.metrics import latest
from heliostat.tracking.reconcile import settle

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import Run

COLUMNS = ("run", "name", "status", "began", "step", "loss", "held-out", "rate", "goodput", "worker-hours")


class About(TypedDict):
    """Describes a run with the fields from MLflow's list of runs. `started` and `ended`: seconds since the epoch."""

    run_id: str
    name: str
    experiment: str
    status: str
    reason: str | None
    started: float
    ended: float | None


class RunRow(About):
    """Describes a run as a row of the table.

    `per_second`: tokens or samples per second. `worker_hours`: workers times hours, over all attempts. `sweep`: the run id of
    the run's sweep.
    """

    step: int
    steps: int | None
    train_loss: float | None
    eval_loss: float | None
    per_second: float | None
    goodput: float | None
    worker_hours: float | None
    gpus: float
    sweep: str | None


def rows(client: MlflowClient, experiment: str | None) -> list[RunRow]:
    """Builds a row for each run that heliostat made. First corrects the status of runs whose driver has died (`settle`)."""
    names = mlflow_client.experiments(client, experiment)
    return [row(settle(client, run), names[run.info.experiment_id]) for run in mlflow_client.runs(client, list(names))]


def about(run: Run, experiment: str) -> About:
    return {
        "run_id": run.info.run_id,
        "name": run.data.tags[tags.NAME],
        "experiment": experiment,
        "status": run.info.status,
        "reason": run.data.tags.get(tags.REASON),
        "started": run.info.start_time / 1000,
        "ended": run.info.end_time / 1000 if run.info.end_time else None,
    }


def row(run: Run, experiment: str) -> RunRow:
    """Builds the table's row for a run, from its metrics, tags, and params in MLflow."""
    metrics, known, params = latest(run.data.metrics), run.data.tags, run.data.params
    at = {m.key: m.step for m in run.data.to_proto().metrics}
    return {
        **about(run, experiment),
        "step": at.get("train/loss", 0),
        "steps": int(steps) if (steps := known.get(tags.STEPS, params.get("train.steps"))) else None,
        "train_loss": metrics.get("train/loss"),
        "eval_loss": metrics.get("eval/loss"),
        "per_second": metrics.get("train/tokens_per_second"),
        "goodput": metrics.get("train/time/goodput"),
        "worker_hours": metrics.get("train/time/worker_hours"),
        "gpus": float(params.get("workers.gpus", 0)),
        "sweep": known.get(tags.PARENT_RUN),
    }


def cells(rows: list[RunRow]) -> list[list[str]]:
    """Formats rows as text. The first row has the names of the columns."""
    return [list(COLUMNS), *(_cells(r) for r in rows)]


def _cells(r: RunRow) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    began = datetime.fromtimestamp(r["started"]).isoformat(sep=" ", timespec="minutes")
    step = f"{r['step']:,}/{r['steps']:,}" if r["steps"] else f"{r['step']:,}"
    return [r["run_id"], ("  " if r["sweep"] else "") + r["name"], r["status"], began, step, number(r["train_loss"], ".4f"),
            number(r["eval_loss"], ".4f"), number(r["per_second"], ",.0f"), number(r["goodput"], ".1%"),
            number(r["worker_hours"], ".3f")]  # fmt: skip
