"""Shows the results of curation, and trains quality classifiers: `heliostat data` trace, forget, report, train-classifier."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.cli import completion
from heliostat.cli.common import Report, command, finish, out, print_table, tracking, write_page
from heliostat.cli.groups import DATA
from heliostat.cli.options import Prices, TrackingUri, argument
from heliostat.errors import ConfigError

if TYPE_CHECKING:
    from heliostat.data.manifest import Manifest

MOST = 20  # maximum printed documents, samples, and steps; --json prints all

Dataset = Annotated[str, argument("DATASET", "A dataset made with stages: a folder or s3:// URI", completion.datasets)]
Url = Annotated[
    str | None, typer.Option("--url", help="Choose the document by its value in the dataset's column `url`", metavar="URL")
]
Id = Annotated[
    str | None,
    typer.Option(
        "--id",
        help="Choose the document by its id, which is the document's path in the input, such as a.html, or a.jsonl#12 (a record)",
        metavar="ID",
    ),
]
Text = Annotated[Path | None, typer.Option("--text", help="Choose the document that has the text of this file", metavar="FILE")]


def _found(dataset: str, url: str | None, id: str | None, text: Path | None) -> tuple[Manifest, list[Report]]:
    from heliostat.curation.text.trace import find
    from heliostat.data import manifest
    from heliostat.storage.locations import Location

    if sum(x is not None for x in (url, id, text)) != 1:
        raise ConfigError("DATASET: the command needs one document. Pass exactly one of --url URL, --id ID, --text FILE")
    try:
        raw = text.read_bytes() if text else None
    except OSError as e:
        raise ConfigError(f"--text: can't read {text} ({e.strerror}). Pass a text file") from e
    dataset_ = manifest.read(Location(dataset))
    return dataset_, find(dataset_, id=id, url=url, text=raw)


@command(DATA, example=".heliostat/data/mine --out curation.html")
def report(
    dataset: Dataset,
    to: Annotated[Path, typer.Option("--out", help="HTML file to write", metavar="FILE")] = Path("curation.html"),
    prices: Prices = None,
) -> None:
    """Write an HTML page about how a dataset was made: funnel, histograms, examples, clusters, languages, domains."""
    from heliostat.data import manifest
    from heliostat.plan import hardware
    from heliostat.storage.locations import Location
    from heliostat.tracking.report import curation

    table = hardware.table(prices)
    prepared = manifest.read(Location(dataset))
    facts = curation.gather(prepared, table["devices"]["cpu"]["hour"], table["currency"])
    write_page(to, lambda: curation.page(facts))
    finish({"file": str(to), "dataset": str(prepared.location), "digest": prepared.digest, **_stages(facts)})


def _stages(facts: Report) -> Report:
    """Summarizes the funnel. For each stage, counts the input, kept, and dropped documents, and the seconds."""
    names = ("documents", "bytes", "kept", "kept_bytes", "dropped", "counts")
    parts = {name: {k: part[k] for k in names if k in part} for name, part in facts["funnel"].items()}
    return {"stages": {n: p | {"seconds": facts["seconds"].get(n)} for n, p in parts.items()}}


@command(DATA, example=".heliostat/data/mine --url https://example.com/page")
def trace(
    dataset: Dataset,
    url: Url = None,
    id: Id = None,
    text: Text = None,
    run: Annotated[
        str | None, typer.Option(help="Show only this run: an id or a folder", metavar="RUN", autocompletion=completion.runs)
    ] = None,
    mlflow: TrackingUri = None,
) -> None:
    """Show a document's provenance: source, stages, kept duplicate, shard, and training steps."""
    from heliostat.curation.text import trace as tracing

    prepared, ends = _found(dataset, url, id, text)
    traces = [tracing.trace(prepared, end) for end in ends]
    for one in traces:
        has_copy = one["shard"] or one["end"]["reason"] == "forgotten"
        one |= _runs(prepared, one["kept"] or one["id"], run, mlflow) if has_copy else {"runs": [], "copies": []}
    for one in traces[:MOST]:
        _print(one)
    if len(traces) > MOST:
        out.print(f"and {len(traces) - MOST:,} more documents; --json has them")
    finish({"dataset": str(prepared.location), "digest": prepared.digest, "documents": traces})


@command(DATA, example=".heliostat/data/mine --id crawl/a.warc.gz#12 --out .heliostat/data/mine-2")
def forget(
    dataset: Dataset,
    to: Annotated[
        str, typer.Option("--out", help="Dataset to write: a folder or s3:// URI", metavar="DATASET2", show_default=False)
    ],
    url: Url = None,
    id: Id = None,
    text: Text = None,
    mlflow: TrackingUri = None,
) -> None:
    """Make a dataset without a document, and list every run that has trained on it, with the steps."""
    from heliostat.curation import forget as forgetting
    from heliostat.data.manifest import read
    from heliostat.storage.locations import Location

    output = Location(to)
    forgetting.check(read(Location(dataset)), output)
    prepared, ends = _found(dataset, url, id, text)
    target, rows = forgetting.one(ends, "--url" if url else "--text" if text else "--id")
    report = _ways(prepared, target, mlflow)
    new = forgetting.forget(prepared, target, rows, output)
    result = {"dataset": str(output), "digest": new.digest, "previous": prepared.digest, "documents": new.meta["documents"],
              "tokens": new.tokens, "forgotten": sorted({target, *(row["id"] for row in rows)}), **report}  # fmt: skip
    _print_forgotten(result)
    finish(result)


def _ways(dataset: Manifest, id: str, mlflow: str | None) -> Report:
    """Reports a document's position in the dataset, the duplicate that was kept instead, and the runs that trained on the
    document."""
    from heliostat.curation import reasons
    from heliostat.curation.text import trace as tracing

    traced = tracing.trace(dataset, reasons.end_of(dataset, id)[0])
    if traced["kept"] != id:
        return {"shard": None, "instead": traced["instead"], "runs": [], "copies": []}
    return {"shard": traced["shard"], "instead": traced["instead"], **_runs(dataset, id, None, mlflow)}


def _print_forgotten(report: Report) -> None:
    tokens = f", {report['tokens']:,} tokens" if report["tokens"] else ""
    out.print(f"dataset {report['dataset']} is ready: {report['documents']:,} documents{tokens}, digest {report['digest'][:12]}; "
              f"the dataset no longer contains {', '.join(report['forgotten'])}")  # fmt: skip
    if report["shard"]:
        out.print(f"  the document was in shard {report['shard']['path']} of version {report['previous'][:12]}")
    else:
        out.print("  the document was in no shard; the dataset had only a record of the document")
    for hop in report["instead"]:
        out.print(
            "  a near-duplicate is still in the dataset. To remove this near-duplicate too, run the "
            f"command again with --id {hop['id']}"
        )
    _print_runs(report)
    for copy in report["copies"]:
        id = shlex.quote(report["forgotten"][0])
        fix = f"heliostat data forget {copy['uri']} --id {id} --out {copy['uri'].rstrip('/')}-2"
        out.print(f"  the dataset {copy['name']} was made from this dataset, and contains the document. Run: {fix}")
    if report["runs"]:
        also = ", and prepare the named datasets again" if any(row["outdated"] for row in report["runs"]) else ""
        out.print(f"  train these runs again without the document, each after the runs from which it inherits{also}")
    out.print("  the old dataset, its earlier versions, the input, and the models of these runs still contain the document")


def _runs(dataset: Manifest, id: str, run: str | None, mlflow: str | None) -> Report:
    """Finds the runs that have trained on a document, and the datasets with the document that were made from this dataset."""
    from heliostat.tracking import mlflow_client
    from heliostat.tracking.lineage_of_documents import TrainedOnDocument

    with tracking(mlflow) as (client, uri):
        only = mlflow_client.find(client, run, uri).info.run_id if run else None
        trained = TrainedOnDocument(client, dataset, id)
        return {"runs": trained.runs(only), "copies": trained.copies}


def _print(traced: Report) -> None:
    out.print(traced["id"], style="bold")
    read = dict(traced["read"])
    where = "".join(
        f", {name} {at:,}" if isinstance(at, int) else f", {name} {at}" for name, at in read.items() if name != "file"
    )
    out.print(f"  read from {read['file']}{where}")
    for name, value in traced["columns"].items():
        out.print(f"  {name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    for stage in traced["stages"]:
        out.print(f"  {stage['stage']}: {_did(stage)}")
    if not any(stage["did"] == "dropped" for stage in traced["stages"]):
        end = traced["end"]
        out.print(f"  {end['stage']}: {end['reason']}" + (f" ({end['what']})" if end["what"] else "") + f", {end['detail']}")
    for hop in traced["instead"]:
        cluster = f", one of {hop['cluster']:,} in the cluster" if hop["cluster"] else ""
        out.print(f"  kept instead: {hop['id']} ({hop['by']}{cluster})")
    if traced["shard"]:
        place = "row {first:,}" if traced["rows"] else "{tokens:,} tokens from {first:,}"
        pieces = [f"row group {p['row_group']}, {place.format(**p)}" for p in traced["shard"]["pieces"]]
        out.print(f"  in shard {traced['shard']['path']}: {'; '.join(pieces)}")
    else:
        out.print("  in no shard" + ("" if traced["end"]["reason"] == "forgotten" else ", so no run has trained on it"))
    for note in traced["notes"]:
        out.print(f"  note: {note}")
    for copy in traced["copies"]:
        out.print(f"  also in dataset {copy['name']} ({copy['uri']}), which was made from this dataset")
    _print_runs(traced)


def _did(stage: Report) -> str:
    reason = f" ({stage['reason']}: {stage['what']})" if stage["what"] else f" ({stage['reason']})" if stage["reason"] else ""
    size = stage.get("bytes") if stage["did"] == "changed" else None
    text = stage["did"] + reason + (f", {stage['detail']}" if stage["detail"] else "")
    text += f", {size[0]:,} to {size[1]:,} bytes" if size else ""
    figures = []
    for name, value in stage["measures"].items():
        limits = ", ".join(f"{limit:g}" for limit in stage["thresholds"].get(name, []))
        figures.append(f"{name} {value:.4g}" + (f" [{limits}]" if limits else ""))
    figures += [f"{name} {count:,}" for name, count in stage["counts"].items()]
    return text + (f"; {', '.join(figures)}" if figures else "")


def _s(rows: list[Any]) -> str:
    return "" if len(rows) == 1 else "s"


def _print_runs(report: Report) -> None:
    for row in report["runs"]:
        steps = ", ".join(f"{step:,}" for step in row["steps"][:MOST]) + (" ..." if len(row["steps"]) > MOST else "")
        used = f"{len(row['samples']):,} sample{_s(row['samples'])} in step{_s(row['steps'])} {steps}"
        how = used if row["samples"] else "no sample in this run"
        how += f", inherited from {', '.join(row['inherited'])}" if row["inherited"] else ""
        how += f"; the run's samples are unknown: {row['fault']}" if row["fault"] else ""
        how += f"; {row['unsure']:,} replaced samples are not listed" if row["unsure"] else ""
        how += "; the run is deleted in MLflow" if row["status"] == "DELETED" else ""
        out.print(f"  run {row['name']} ({row['run_id']}): {how}; {' '.join(row['models']) or 'no registered model'}")
        for dataset in row["outdated"]:
            out.print(f"    its dataset {dataset} has log-probabilities or answers of a model that contains the document")
        for export in row["exports"]:
            what = "adapter" if export["adapter"] else "model"
            out.print(f"    {what} of step {export['step']:,} exported to {export['folder']}")
        for sample in row["samples"][:MOST]:
            where = "virtual rank {lane}, place {place}, epoch {epoch}".format(**sample)
            where = "in place of a bad sample" if sample["lane"] is None else where
            out.print(f"    step {sample['step']:,}: {where}; row group {sample['row_group']}, sample {sample['row']}")
    if report["shard"] and not report["runs"]:
        out.print("  no recorded run has trained on the document")


Good = Annotated[Path, argument("GOOD", "A folder of documents to keep")]
Bad = Annotated[Path, argument("BAD", "Folder with examples of documents to drop")]


@command(DATA, example="good bad --out models/quality")
def train_classifier(
    good: Good, bad: Bad, to: Annotated[Path, typer.Option("--out", help="Folder to write the classifier to", metavar="FOLDER")]
) -> None:
    """Train a quality classifier from two folders of examples, for `stage: classifier`; prints precision and recall."""
    from heliostat.curation import training

    report = training.train(good, bad, to)
    trained = f"{report['trained_good']:,} good and {report['trained_bad']:,} bad documents"
    held_out = f"{report['held_out_good']:,} good and {report['held_out_bad']:,} bad ones"
    out.print(f"classifier {to}: trained on {trained}. Scores on held-out documents ({held_out}):")
    cells = [["min_score", "precision", "recall"]]
    for threshold, at in report["held_out"].items():
        precision = "none chosen" if at["precision"] is None else f"{at['precision']:.1%}"
        cells.append([threshold, precision, f"{at['recall']:.1%}"])
    print_table(cells)
    for reason, count in sorted(report["left_out"].items()):
        out.print(f"left out: {count:,} {reason}")
    out.print(f"Next: add to the stages of a pipeline: {{stage: classifier, model: {to}, min_score: 0.5}}")
    finish({"folder": str(to), **report})
