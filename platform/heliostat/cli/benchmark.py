"""Scores models on tasks (`heliostat model benchmark`), and makes tasks from held-out text (`heliostat model make-suite`)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli.common import command, finish, model_folder, out, print_table, require_file, run_folder, store_uri
from heliostat.cli.groups import MODEL
from heliostat.cli.options import Model, TextDataset, TrackingUri, argument, flag
from heliostat.errors import ConfigError, TrackingError
from heliostat.text import plural

if TYPE_CHECKING:
    from heliostat.evaluation.paired import PairedResult
    from heliostat.evaluation.run import Benchmark


@command(MODEL, example="models:/quickstart-lm/1 suite/suite.yaml --out scores.json")
def benchmark(
    model: Model,
    suite: Annotated[Path, argument("SUITE", "A suite of tasks (docs/benchmark.md)")],
    to: Annotated[str, typer.Option("--out", metavar="FILE", help="JSON file to write, or s3://BUCKET/KEY")] = "benchmark.json",
    follow: Annotated[
        bool, flag("--follow", help="Score each checkpoint of a run as it appears; MODEL is the run's id or folder")
    ] = False,
    every: Annotated[
        int, typer.Option(min=1, help="With --follow: score only checkpoints at multiples of this step, and the last checkpoint")
    ] = 1,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="FILE", help="Result file of another model on this suite: show the paired difference"),
    ] = None,
    mlflow: TrackingUri = None,
) -> None:
    """Score a language model on lm-eval tasks, with confidence intervals, chance levels, and contamination."""
    if every != 1 and not follow:
        raise ConfigError(f"--every: has an effect only with --follow ({every}). Add --follow")
    if compare is not None and follow:
        raise ConfigError(f"--compare: not supported with --follow ({compare}). Remove one of the two")
    from heliostat.evaluation import paired, run
    from heliostat.evaluation.suite import load
    from heliostat.storage.locations import Location

    require_file(Location(to))
    suite_, folder = load(suite)
    with contextlib.closing(run.Benchmark(suite_, folder, out.quiet)) as tasks:
        if follow:
            _follow(tasks, model, every, to, mlflow)
        else:
            other = None if compare is None else paired.read(Location(compare), suite_, tasks.digests)
            _once(tasks, model, to, mlflow, other)


def _once(tasks: Benchmark, model: str, to: str, mlflow: str | None, other: PairedResult | None) -> None:
    from heliostat.evaluation import paired, recording, run, scoring, shown
    from heliostat.storage.locations import Location

    folder, fault = model_folder(model, mlflow), None
    scoring.require_language_model(folder)
    result = tasks.score(folder)
    differences = [] if other is None else paired.differences(result["tasks"], other)
    result["compared"] = None if other is None else [one._asdict() for one in differences]
    run.write(result, Location(to))
    try:
        result["recorded"] = recording.record(store_uri(mlflow), result)
    except TrackingError as e:  # the file has the scores
        fault, result["recorded"] = e, recording.unrecorded(str(e))
    run.write(result, Location(to))
    print_table(shown.rows(result), left=(0, 1))
    for note in [*map(shown.difference, differences), *shown.notes(result)]:
        out.print(note)
    out.print(f"wrote {to}")
    rows = [{name: value for name, value in row.items() if name != "values"} for row in result["tasks"]]  # the file has them
    finish({**result, "tasks": rows, "file": to}, fault)


def _follow(tasks: Benchmark, model: str, every: int, to: str, mlflow: str | None) -> None:
    from heliostat.evaluation import run, shown
    from heliostat.evaluation.follow import Followed, summary
    from heliostat.storage.locations import Location

    def show(step: int, result: dict[str, object]) -> None:
        out.print(shown.line(step, result))

    followed = Followed(run_folder(model, mlflow), tasks, show, every)
    followed.follow()
    totals = summary(followed)
    run.write(totals, Location(to))
    for line in shown.missed(totals):
        out.print(line)
    unknown = sum(one["recorded"]["run_id"] is None for one in totals["steps"])
    lacking = f", but MLflow doesn't have {unknown:,} of them" if unknown else ""
    out.print(f"scored {plural(len(totals['steps']), 'checkpoint')}{lacking}")
    finish({**totals, "file": to})


@command(MODEL, example=".heliostat/data/quickstart --out suite")
def make_suite(
    dataset: TextDataset,
    to: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder to write; it must be empty or missing", show_default=False)
    ],
    examples: Annotated[int, typer.Option(min=10, max=100_000, help="Maximum number of examples per task")] = 200,
    fraction: Annotated[
        float,
        typer.Option(
            min=0.0001,
            max=0.9999,
            help="Fraction of the dataset that is held out; at most evaluate.fraction in the jobs of the models",
        ),
    ] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Random seed; the same seed makes the same files")] = 0,
) -> None:
    """Make a benchmark suite from a dataset's held-out text: multiple choice, cloze, exact match. Downloads nothing."""
    from heliostat.evaluation.held_out import make

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--out: {to} is not empty. Pass another folder")
    result = make(dataset, to, examples, fraction, seed)
    for name, count in result["tasks"].items():
        fewer = "" if count == examples else f", not {examples:,}, because the held-out text is too short"
        out.print(f"{name}: {count:,} examples{fewer}")
    out.print(f"{result['suite']}: made from {result['documents']:,} held-out documents")
    out.print(f"Next:  heliostat model benchmark MODEL {result['suite']}")
    finish(result)
