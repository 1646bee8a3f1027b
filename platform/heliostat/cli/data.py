"""Makes workspaces and datasets: `heliostat init`, `heliostat data prepare`, `heliostat data index`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli import completion
from heliostat.cli.common import command, finish, out, print_table, program
from heliostat.cli.groups import DATA, TOP
from heliostat.cli.options import Dataset, Settings, Verbose, argument, flag
from heliostat.errors import ConfigError


@command(TOP, example="my-workspace")
def init(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the workspace; a missing folder is made", show_default="this folder")
    ] = Path(),
) -> None:
    """Make a workspace with jobs, pipelines, and a local cluster. Never overwrites a file."""
    from heliostat.cli.workspace_template import create

    written = create(folder)
    out.print(f"{folder} is a workspace with {', '.join(path for path in written if path.endswith('.yaml'))}")
    go = "" if folder.resolve() == Path.cwd() else f"cd {folder}\n       "
    name = shlex.quote(program(elsewhere=bool(go)))
    out.print(f"\nNext:  {go}{name} data prepare pipelines/quickstart.yaml\n       {name} train jobs/quickstart.yaml")
    finish({"folder": str(folder), "files": written})


@command(DATA, example="pipelines/quickstart.yaml --set output=.heliostat/data/mine")
def prepare(
    pipeline: Annotated[
        Path, argument("PIPELINE", "A pipeline file, such as pipelines/quickstart.yaml", completion.pipeline_files)
    ],
    setting: Settings = None,
    force: Annotated[bool, flag("--force", help="Make the dataset again, even if it is up to date")] = False,
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Dry run: process a share of the input, such as 0.1%; predict the tokens, hours, and cost of the whole input",
        ),
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Process the share in --sample, then simulate the pipeline for an input of this size, such as 100TB",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            "-c",
            metavar="NODESxCPUS",
            help="With --simulate: the simulated nodes, and the CPUs of each",
            show_default="500x32",
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Make a dataset: run a pipeline on Ray. Does nothing if the dataset is up to date."""
    from heliostat.curation.prepare import prepare as run
    from heliostat.curation.prepare_report import explain

    if simulate is not None and sample is None:
        raise ConfigError("--simulate: needs the share of the input to measure. Add --sample, for example --sample 1%")
    if cluster is not None and simulate is None:
        raise ConfigError("--cluster: only for a simulation. Remove --cluster, or add --simulate, for example --simulate 100TB")
    if sample is not None:
        if force:
            raise ConfigError("--force: not with --sample, which makes no dataset. Remove one of the two")
        if simulate is not None:
            _simulate(pipeline, setting or [], sample, simulate, cluster or "500x32")
            return
        _predict(pipeline, setting or [], sample)
        return
    report = run(pipeline, setting or [], force=force, quiet=out.quiet)
    for line in explain(report):
        out.print(line)
    finish(report)


def _simulate(pipeline: Path, settings: list[str], sample: str, size: str, cluster: str) -> None:
    from heliostat.curation import prediction
    from heliostat.curation.simulation import simulate, tables
    from heliostat.plan import hardware

    whole, nodes = simulate.bytes_of(size), simulate.nodes_of(cluster)
    result = simulate.simulate(pipeline, settings, whole, nodes, prediction.fraction(sample), quiet=out.quiet)
    prices = hardware.table()
    result |= {"cost": result["wall_hours"] * result["cpus"] * prices["devices"]["cpu"]["hour"], "currency": prices["currency"]}
    print_table(tables.of_kinds(result), left=(0,))
    print_table(tables.of_requests(result), left=(0,))
    for line in tables.explain(result):
        out.print(line)
    finish(result)


def _predict(pipeline: Path, settings: list[str], sample: str) -> None:
    from heliostat.curation import prediction
    from heliostat.curation.prepare import dry_run
    from heliostat.plan import hardware

    result = dry_run(pipeline, settings, prediction.fraction(sample), quiet=out.quiet)
    prices = hardware.table()
    result |= {"cost": result["cpu_hours"] * prices["devices"]["cpu"]["hour"], "currency": prices["currency"]}
    print_table(prediction.table(result), left=(0,))
    for line in prediction.explain(result):
        out.print(line)
    finish(result)


@command(DATA, example=".heliostat/data/quickstart")
def index(dataset: Dataset) -> None:
    """Add new shards in a dataset's folder to the dataset's manifest, as a new version. Earlier versions stay valid."""
    from dataclasses import asdict

    from heliostat.data.index import index as run
    from heliostat.storage.locations import Location

    report = run(Location(dataset))
    change = f"digest {report.digest[:12]}, was {report.previous[:12]}" if report.shards_added else "nothing new"
    out.print(f"dataset {report.dataset}: {report.shards_added:,} shards added, {change}; {report.rows:,} rows, "
              f"{report.tokens:,} tokens in {report.chunks:,} row groups")  # fmt: skip
    finish(asdict(report))
