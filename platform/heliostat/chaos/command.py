"""`heliostat chaos`: breaks a job's runs on purpose, and shows what that cost."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

log = logging.getLogger(__name__)

HEADS = {
    "fault": "fault", "detected_s": "detected after", "recovered_s": "recovered after", "recomputed_steps": "steps recomputed",
    "lost": "samples lost", "repeated": "samples repeated", "loss_difference": "final loss difference", "goodput": "goodput",
}  # fmt: skip
ISSUE = "kill-worker,kill-node,hang,sigterm,s3-503,corrupt-shard,torn-checkpoint,mlflow-down,disk-full"


def chaos(
    job: Path,
    faults: Annotated[str, typer.Option(help="Which, by commas; also kill-driver, kill-driver-late, restart-head")] = ISSUE,
    seed: Annotated[int, typer.Option(help="Of when and whom the faults strike")] = 0,
    rate: Annotated[float, typer.Option(min=0.01, max=0.9, help="s3-503: the share of requests that are refused")] = 0.2,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Change a key: --set train.steps=100")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON list as the last line")] = False,
) -> None:
    """Break a job's runs on purpose, one fault a run, and compare each with the unbroken run: nothing may be lost."""
    from heliostat.chaos.experiment import chaos as run
    from heliostat.errors import VerifyError

    names = [name.strip() for name in faults.split(",") if name.strip()]
    rows, wrong = run(job, names, setting, seed, rate, tell=log.info)
    if json_:
        sys.stdout.write(json.dumps(rows) + "\n")
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    if wrong:
        raise VerifyError("\n  ".join(["not every run ended as the unbroken one did:", *wrong]))


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(*HEADS.values())
    for column in made.columns[1:]:
        column.justify = "right"
    for row in rows:
        made.add_row(*cells(row))
    return made


def cells(row: dict[str, Any]) -> list[str]:
    def text(key: str, value: Any) -> str:
        if value is None:
            return "-"
        if key.endswith("_s"):
            return f"{value:,.1f} s"
        if key == "goodput":
            return f"{value:.1%}"
        return f"{value:.2g}" if key == "loss_difference" else str(value)

    return [text(key, row[key]) for key in HEADS]
