"""Prepares and indexes datasets: `heliostat prepare`, `heliostat index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.common import DATA, Json, Settings, Verbose, app, finish, flag, out


@app.command(rich_help_panel=DATA)
def prepare(
    pipeline: Annotated[
        Path, typer.Argument(help="A pipeline file, as pipelines/quickstart.yaml", metavar="PIPELINE", show_default=False)
    ],
    setting: Settings = None,
    force: Annotated[bool, flag("--force", help="Make it again though it is up to date")] = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a dataset: run a pipeline's Ray Data job. Does nothing if the dataset is up to date."""
    from heliostat.pipelines.prepare import explain
    from heliostat.pipelines.prepare import prepare as run

    report = run(pipeline, setting or [], force=force)
    if not json_:
        for line in explain(report):
            out.print(line)
    finish(report, json_)


@app.command(rich_help_panel=DATA)
def index(
    dataset: Annotated[
        str, typer.Argument(help="A prepared dataset: a folder or s3:// URI", metavar="DATASET", show_default=False)
    ],
    json_: Json = False,
) -> None:
    """Take shards that were added to a dataset's folder into its manifest: a new version, old ones stay valid."""
    from dataclasses import asdict

    from heliostat.data.index import index as run
    from heliostat.storage import Location

    report = run(Location(dataset))
    if not json_:
        change = f"digest {report.digest[:12]}, was {report.previous[:12]}" if report.shards_added else "nothing new"
        out.print(f"dataset {report.dataset}: {report.shards_added:,} shards added, {change}; {report.rows:,} rows, "
                  f"{report.tokens:,} tokens in {report.chunks:,} chunks")  # fmt: skip
    finish(asdict(report), json_)
