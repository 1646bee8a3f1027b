"""Works on what curation decides by: `heliostat curate train-classifier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.common import DATA, HELP, Json, app, finish, out, print_table

curate_app = typer.Typer(no_args_is_help=True, context_settings=HELP, help="What curation decides by: train a classifier.")
app.add_typer(curate_app, name="curate", rich_help_panel=DATA)

Good = Annotated[Path, typer.Argument(help="A folder of documents that are wanted", metavar="GOOD", show_default=False)]
Bad = Annotated[Path, typer.Argument(help="A folder of documents that are not", metavar="BAD", show_default=False)]


@curate_app.command("train-classifier")
def train_classifier(
    good: Good,
    bad: Bad,
    to: Annotated[Path, typer.Option("--out", help="The folder of the classifier, which is made", metavar="FOLDER")],
    json_: Json = False,
) -> None:
    """Train a quality classifier from two folders of examples, for `stage: classifier`; prints precision and recall."""
    from heliostat.curation import training

    report = training.train(good, bad, to)
    if not json_:
        held = f"{report['held_out_good']:,} good and {report['held_out_bad']:,} bad ones that were held out"
        out.print(
            f"classifier {to}: trained on {report['trained_good']:,} good and {report['trained_bad']:,} bad documents; of {held}:"
        )
        cells = [["min_score", "precision", "recall"]]
        for threshold, at in report["held_out"].items():
            precision = "none chosen" if at["precision"] is None else f"{at['precision']:.1%}"
            cells.append([threshold, precision, f"{at['recall']:.1%}"])
        print_table(cells)
        for reason, count in sorted(report["left_out"].items()):
            out.print(f"left out: {count:,} {reason}")
        out.print(f"use it: {{stage: classifier, model: {to}, min_score: 0.5}}")
    finish({"folder": str(to), **report}, json_)
