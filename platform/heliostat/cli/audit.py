"""Shows what a run left behind: `heliostat checkpoints`, `verify`, `goodput`, `samples`."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli.common import command, finish, out, print_table, run_folder
from heliostat.cli.options import RUNS, Run, TrackingUri, flag
from heliostat.errors import VerifyError

if TYPE_CHECKING:
    from heliostat.checkpoint.retention import RetentionRow
    from heliostat.runs.samples import Sample


@command(RUNS)
def checkpoints(run: Run, mlflow: TrackingUri = None) -> None:
    """List a run's checkpoints: what each is, whether it is whole, and which rule keeps it."""
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
        facts = [f"{row['step']:,}", "torn", f"{row['bytes'] / 1e6:,.1f}", "", "", "", row["fault"] or ""]
        if row["whole"]:
            written = datetime.fromtimestamp(row["written"]).isoformat(sep=" ", timespec="seconds")
            scores = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row["metrics"].items() if v is not None)
            shape = (str(row["world_size"]), str(row["zero_stage"]))
            facts = [facts[0], written, facts[2], *shape, ", ".join(row["kept"]) or "not kept on", scores]
        table.append(facts)
    return table


@command(RUNS)
def verify(run: Run, mlflow: TrackingUri = None) -> None:
    """Check a run's receipts against its datasets: what every step trained on, and that nothing was lost or repeated."""
    from heliostat.runs import verify as verifying

    place = run_folder(run, mlflow)
    report = verifying.verify(place)
    out.print(f"{report['steps']:,} steps are as their receipts say: {report['samples']:,} samples, {report['lost']:,} lost, "
              f"{report['repeated']:,} repeated, {report['replaced']:,} bad ones replaced")  # fmt: skip
    finish(report, None if report["ok"] else VerifyError(f"{place}: {verifying.explain(report)}"))


@command(RUNS)
def goodput(run: Run, mlflow: TrackingUri = None) -> None:
    """Tell where a run's time went, from the command's start to the end, over all its restarts: parts that add up to 100 %."""
    from heliostat.runs import goodput as accounting
    from heliostat.tracking.reconcile import settle_folder

    place = run_folder(run, mlflow)
    settle_folder(place)
    report = accounting.read_report(place)
    print_table(accounting.table(report))
    finish(report)


@command(RUNS)
def samples(
    run: Run,
    step: Annotated[int, typer.Option(min=1, help="The first is 1", show_default=False)],
    full: Annotated[bool, flag("--full", help="Show each sample's whole text")] = False,
    mlflow: TrackingUri = None,
) -> None:
    """Show the samples that a step trained on: their places in the datasets, and their text."""
    from heliostat.runs.samples import samples as read

    found = read(run_folder(run, mlflow), step)
    for sample in found:
        _print_sample(sample, full)
    finish({"step": step, "samples": found})


def _print_sample(sample: Sample, full: bool) -> None:
    where = "lane {lane}, place {place}: {source}/{shard}, row group {row_group}, row {row}, epoch {epoch}"
    out.print(where.format(**sample), style="bold")
    if bad := sample["replaces"]:
        out.print(f"  in place of {bad['shard']}, row group {bad['row_group']}, row {bad['row']}: {bad['reason']}")
    text = sample["text"]
    out.print(text if full else "  " + json.dumps(text[:200], ensure_ascii=False) + (" ..." if text[200:] else ""))
