"""Breaks a job's runs on purpose, and shows what that cost: `heliostat chaos`."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from heliostat.cli.common import command, finish, print_table
from heliostat.cli.options import TRAINING, JobFile, Settings
from heliostat.errors import VerifyError

log = logging.getLogger(__name__)

HEADS = {
    "fault": "fault", "detected_s": "detected after", "recovered_s": "recovered after", "recomputed_steps": "steps recomputed",
    "lost": "samples lost", "repeated": "samples repeated", "loss_difference": "final loss difference", "goodput": "goodput",
}  # fmt: skip
ISSUE = "kill-worker,kill-node,hang,sigterm,s3-503,corrupt-shard,torn-checkpoint,mlflow-down,disk-full"
Row = dict[str, Any]  # of the comparison, as `--json` prints it


@command(TRAINING)
def chaos(
    job: JobFile,
    faults: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Which; also kill-driver, kill-driver-late, restart-head",
            show_default=ISSUE.replace(",", ", "),
        ),
    ] = ISSUE,
    seed: Annotated[int, typer.Option(help="Of when and whom the faults strike")] = 0,
    rate: Annotated[float, typer.Option(min=0.01, max=0.9, help="s3-503: the share of requests that are refused")] = 0.2,
    setting: Settings = None,
) -> None:
    """Break a job's runs on purpose, one fault a run, and compare each with the unbroken run: nothing may be lost."""
    from heliostat.chaos.experiment import chaos as run

    names = [name.strip() for name in faults.split(",") if name.strip()]
    rows, wrong = run(job, names, setting, seed, rate, tell=log.info)
    print_table(table(rows))
    fault = VerifyError("\n  ".join(["not every run ended as the unbroken one did:", *wrong])) if wrong else None
    finish({"faults": rows}, fault)


def table(rows: list[Row]) -> list[list[str]]:
    """Formats the rows as text, the columns' names first."""
    return [list(HEADS.values()), *(cells(row) for row in rows)]


def cells(row: Row) -> list[str]:
    def text(key: str, value: object) -> str:
        if value is None:
            return "-"
        if key.endswith("_s"):
            return f"{value:,.1f} s"
        if key == "goodput":
            return f"{value:.1%}"
        return f"{value:.2g}" if key == "loss_difference" else str(value)

    return [text(key, row[key]) for key in HEADS]
