"""Shows runs and models from MLflow and run folders: `heliostat run`, `model promote`, `debug` profile, reproduce.

docs/mlflow.md lists what heliostat records.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import completion
from heliostat.cli.common import (
    command,
    finish,
    keys_of,
    out,
    print_page,
    print_table,
    run_folder,
    store_uri,
    tracking,
    write_page,
)
from heliostat.cli.groups import DEBUG, MODEL, RUN
from heliostat.cli.options import Keys, Run, Settings, TrackingUri, argument, flag
from heliostat.errors import ConfigError, VerifyError
from heliostat.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from heliostat.checkpoint.retention import RetentionRow
    from heliostat.runs.samples import Sample


@command(RUN, "list", example="--experiment quickstart")
def runs(
    experiment: Annotated[str | None, typer.Option(metavar="NAME", help="Show only runs of this MLflow experiment")] = None,
    mlflow: TrackingUri = None,
) -> None:
    """List runs, newest first: status, step, losses, tokens per second, goodput, worker-hours."""
    from heliostat.tracking import run_table

    with tracking(mlflow) as (client, uri):
        result = run_table.rows(client, experiment)
    if not result:
        out.print(f"no run in {redact(uri)}. Train one: heliostat train JOB.yaml")
    else:
        print_table(run_table.cells(result), left=range(4))
    finish({"runs": result})


@command(RUN, example=".heliostat/runs/quickstart --out report.html")
def report(
    run: Run,
    to: Annotated[Path, typer.Option("--out", metavar="FILE", help="HTML file to write")] = Path("report.html"),
    mlflow: TrackingUri = None,
) -> None:
    """Write an HTML page about a run: curves, goodput, restarts, samples, lineage."""
    from heliostat.tracking import mlflow_client
    from heliostat.tracking.reconcile import settle
    from heliostat.tracking.report import page

    with tracking(mlflow) as (client, uri):
        ended = settle(client, mlflow_client.find(client, run, uri))
        write_page(to, lambda: page.page(page.gather(client, ended)))
    finish({"file": str(to), "run_id": ended.info.run_id})


@command(RUN, example="models:/quickstart-lm/1")
def lineage(
    what: Annotated[
        str | None,
        typer.Argument(
            help="models:/NAME/VERSION, NAME@ALIAS, a run id, or the folder of a run or of an exported model",
            metavar="MODEL",
            autocompletion=completion.models,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="List the runs that trained on this shard; pass the shard's path, or the end of this path"
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="List the runs that trained on the dataset with this digest")
    ] = None,
    mlflow: TrackingUri = None,
) -> None:
    """Show a model's provenance: run, restarts, code, machines, shards, parents. Or list the models of a shard or dataset."""
    from heliostat.tracking import lineage_lines
    from heliostat.tracking.lineage import lineage

    if sum(x is not None for x in (what, shard, dataset)) != 1:
        raise ConfigError("MODEL: the command needs one choice. Pass exactly one of MODEL, --shard PATH, and --dataset DIGEST")
    if dataset is not None and len(dataset) < 6:
        raise ConfigError(f"--dataset: the digest is too short ({dataset}). Pass at least its first 6 digits")
    with tracking(mlflow) as (client, uri):
        if what is None:
            _backwards(client, shard, dataset)
            return
        result = lineage(client, uri, what)
    for depth, text in lineage_lines.lines(result):
        out.print("  " * depth + text)
    finish(result)


def _backwards(client: MlflowClient, shard: str | None, dataset: str | None) -> None:
    from heliostat.tracking.descendants import Seen

    rows = Seen(client).answer(shard, dataset)
    for row in rows:
        how = f"{row['samples']:,} samples" if row["samples"] else "no sample in this run"
        how += f", inherited from {', '.join(row['inherited'])}" if row["inherited"] else ""
        how += f"; the run's samples are unknown: {row['fault']}" if row["fault"] else ""
        how += "; the run is deleted in MLflow" if row["status"] == "DELETED" else ""
        out.print(f"{row['name']} ({row['run_id']}): {how}; {' '.join(row['models']) or 'no registered model'}")
    if not rows:
        out.print(f"no run has trained on {shard or dataset}")
    finish({"shard": shard, "dataset": dataset, "runs": rows})


@command(MODEL, example="quickstart-lm/2 champion --require 'eval/loss<2.1'")
def promote(
    model: Annotated[str, argument("MODEL", "NAME/VERSION or NAME@ALIAS", completion.registered)],
    alias: Annotated[str, argument("ALIAS", "The alias to assign, for example champion")],
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE", help="A score that the model must have, such as 'eval/loss<2.1'; may be repeated"),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Metric whose value must not be worse than for the alias's current model")
    ] = "eval/loss",
    maximize: Annotated[bool, flag("--maximize", help="Larger values of the metric are better")] = False,
    force: Annotated[
        bool, flag("--force", help="Promote the model even if it fails a rule; the history records the failed rules")
    ] = False,
    mlflow: TrackingUri = None,
) -> None:
    """Give a registered model an alias, unless it is worse than the alias's current model or fails a rule."""
    from heliostat.tracking import registry

    registry.parse(model)  # parsed first, because connecting to the store takes seconds
    with tracking(mlflow) as (client, _):
        done = registry.promote(client, model, alias, require or [], metric, "max" if maximize else "min", force)
    instead = f", in place of version {done['replaced']}" if done["replaced"] else ""
    out.print(f"{done['name']} version {done['version']} is {alias}{instead}")
    for fault in done["overruled"]:
        out.print(f"  promoted because of --force, although a rule failed: {fault}")
    finish(done)


@command(DEBUG, example="quickstart --rank 1 --steps 5")
def profile(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="Worker to profile")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=100, help="Number of steps to profile, from the next step on")] = 5,
    mlflow: TrackingUri = None,
) -> None:
    """Profile a worker of a running job: show the most expensive operations and the longest gaps."""
    from heliostat.runs import profile as profiles
    from heliostat.runs import profile_table as table
    from heliostat.storage.locations import Location
    from heliostat.submit.submission import SubmissionRecord

    record = None if "/" in run else SubmissionRecord.read(run)
    folder = Location(record.run_folder) if record else run_folder(run, mlflow)
    request, answer = profiles.take(folder, rank, steps)
    place = profiles.place(folder, request)
    summary = table.read(place.join(next(name for name in answer["files"] if name.endswith(profiles.TRACE))))
    out.print(
        f"worker {rank}, {answer['steps']} steps from step {answer['first']} on: {summary['seconds']:.3f} s, "
        f"{summary['device']} busy {summary['busy']:.1%}"
    )
    print_table(table.operation_rows(summary))
    print_table(table.gap_rows(summary), left=(2, 3))
    out.print(f"{place}: {', '.join(answer['files'])}")
    if profiles.DRIVER not in answer["files"]:
        out.print("no driver stacks: py-spy isn't installed on the driver's machine, or lacks permission (see the driver's log)")
    finish({"rank": rank, "first": answer["first"], "steps": answer["steps"], "folder": str(place), "files": answer["files"],
            **summary})  # fmt: skip


@command(DEBUG, example=".heliostat/runs/quickstart --steps 20")
def reproduce(
    run: Run,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps of the recorded schedule to train", show_default="all")
    ] = None,
    setting: Settings = None,
    overwrite: Annotated[bool, flag("--overwrite", help="Delete an earlier reproduction of the run")] = False,
    mlflow: TrackingUri = None,
) -> None:
    """Train a recorded run again, and compare the losses of every step and the environments."""
    from heliostat.training import reproduce as again

    with tracking(mlflow) as (client, uri):
        result = again.reproduce(client, uri, run, steps, setting or [], overwrite)
    for note in result["notes"]:
        out.print(f"differs: {note}")
    equal = "bitwise equal"
    if not result["bitwise"]:
        same = f"bitwise equal up to step {result['first_difference'] - 1:,}"
        equal = f"{same}, and differ by at most {result['largest_difference']:.3g}"
    out.print(f"the losses of {result['steps']:,} steps are {equal}; the new run is {result['again']}")
    finish(result)


@command(RUN, example="--port 5000", reports=False)
def ui(
    mlflow: TrackingUri = None,
    keys: Keys = Path(".heliostat/ui/keys"),
    host: Annotated[str, typer.Option(help="Address to listen on; keys are sent unencrypted")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on")] = 5000,
    verbose: Annotated[bool, flag("--verbose", "-v", help="Show the output of MLflow's server")] = False,
) -> None:
    """Open MLflow's UI on the recorded runs, protected by a key, and print its address."""
    from heliostat.tracking.ui import serve

    serve(store_uri(mlflow), host, port, keys, lambda url: print_page(url, keys), keys_of(keys), verbose)


@command(RUN, example=".heliostat/runs/quickstart")
def checkpoints(run: Run, mlflow: TrackingUri = None) -> None:
    """List a run's checkpoints: step, size, completeness, and the rule that keeps each."""
    from heliostat.checkpoint.retention import survey

    place = run_folder(run, mlflow)
    rows = survey(place)
    if not rows:
        out.print(f"no checkpoint in {place}")
    else:
        print_table(_checkpoint_cells(rows), left=(1, 5, 6))
    finish({"run_folder": str(place), "checkpoints": rows})


def _checkpoint_cells(rows: list[RetentionRow]) -> list[list[str]]:
    table = [["step", "written", "MB", "workers", "ZeRO", "kept as", "scores"]]
    for row in rows:
        facts = [f"{row['step']:,}", "incomplete", f"{row['bytes'] / 1e6:,.1f}", "", "", "", row["fault"] or ""]
        if row["whole"]:
            written = datetime.fromtimestamp(row["written"]).isoformat(sep=" ", timespec="seconds")
            scores = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row["metrics"].items() if v is not None)
            shape = (str(row["world_size"]), str(row["zero_stage"]))
            facts = [facts[0], written, facts[2], *shape, ", ".join(row["kept"]) or "no rule", scores]
        table.append(facts)
    return table


@command(RUN, example=".heliostat/runs/quickstart")
def verify(run: Run, mlflow: TrackingUri = None) -> None:
    """Check a run's receipts against its datasets: which samples each step trained on, none lost or repeated."""
    from heliostat.runs import verify as verifying

    place = run_folder(run, mlflow)
    report = verifying.verify(place)
    out.print(f"{report['steps']:,} steps match their receipts: {report['samples']:,} samples, {report['lost']:,} lost, "
              f"{report['repeated']:,} repeated, {report['replaced']:,} bad ones replaced")  # fmt: skip
    finish(report, None if report["ok"] else VerifyError(f"{place}: {verifying.explain(report)}"))


@command(RUN, example=".heliostat/runs/quickstart")
def goodput(run: Run, mlflow: TrackingUri = None) -> None:
    """Show how a run used its time, including all restarts. The shares add up to 100 %."""
    from heliostat.runs import goodput as accounting
    from heliostat.tracking.reconcile import settle_folder

    place = run_folder(run, mlflow)
    settle_folder(place)
    report = accounting.read_report(place)
    print_table(accounting.table(report))
    finish(report)


@command(RUN, example=".heliostat/runs/quickstart --step 100")
def samples(
    run: Run,
    step: Annotated[int, typer.Option(min=1, help="Step to show; the first step is 1", show_default=False)],
    full: Annotated[bool, flag("--full", help="Show the complete text of each sample")] = False,
    mlflow: TrackingUri = None,
) -> None:
    """Show the samples that a step trained on: their positions in the datasets, and their text."""
    from heliostat.runs.samples import samples as read

    result = read(run_folder(run, mlflow), step)
    for sample in result:
        _print_sample(sample, full)
    finish({"step": step, "samples": result})


def _print_sample(sample: Sample, full: bool) -> None:
    where = "virtual rank {lane}, place {place}: {source}/{shard}, row group {row_group}, row {row}, epoch {epoch}"
    out.print(where.format(**sample), style="bold")
    if bad := sample["replaces"]:
        out.print(f"  in place of {bad['shard']}, row group {bad['row_group']}, row {bad['row']}: {bad['reason']}")
    text = sample["text"]
    out.print(text if full else "  " + json.dumps(text[:200], ensure_ascii=False) + (" ..." if text[200:] else ""))
