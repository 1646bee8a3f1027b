"""Every command that a person types: `heliostat --help`.

Results go to standard output, progress and logs to standard error. `--json` prints one object as the last line. Exit codes:
0 done, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.logging import RichHandler

from heliostat.chaos.command import chaos
from heliostat.errors import ConfigError, HeliostatError, VerifyError
from heliostat.redact import Formatter, carries_secret, excepthook
from heliostat.text import printable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class Printer(Console):
    """Standard output: what comes from data moves no cursor and marks up nothing."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(o, lines=True) if isinstance(o, str) else o for o in objects), **{"markup": False, **options})


class Lines(Formatter):
    """The same of what is logged."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


out = Printer(highlight=False, soft_wrap=True, markup=False)

Run = Annotated[str, typer.Argument(help="A run id, or a run's folder (STORAGE/NAME)")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Change a key: --set train.optimizer.lr=1e-3")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of Ray and of the workers, and tracebacks")]
TrackingUri = Annotated[
    str | None, typer.Option("--mlflow", help="MLflow's store; the default is MLFLOW_TRACKING_URI, then the quickstart's")
]
QUIET = {  # other libraries' progress bars and notices, so that ours can be read
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
DEFAULT_STORE = ".heliostat/mlflow.db"


@app.command()
def prepare(pipeline: Path, setting: Settings = None, force: bool = False, json_: Json = False, verbose: Verbose = False) -> None:
    """Make a dataset: run a pipeline YAML's Ray Data job. Does nothing if the dataset is up to date."""
    from heliostat.pipelines.prepare import explain
    from heliostat.pipelines.prepare import prepare as run

    report = run(pipeline, setting or [], force=force)
    if not json_:
        for line in explain(report):
            out.print(line, markup=False)
    _finish(report, json_)


@app.command()
def index(dataset: Annotated[str, typer.Argument(help="A prepared dataset: a folder or s3:// URI")], json_: Json = False) -> None:
    """Take shards that were added to a dataset's folder into its manifest: a new version, old ones stay valid."""
    from dataclasses import asdict

    from heliostat.data.index import index as run
    from heliostat.storage import Location

    report = run(Location(dataset))
    if not json_:
        change = f"digest {report.digest[:12]}, was {report.previous[:12]}" if report.shards_added else "nothing new"
        out.print(f"dataset {report.dataset}: {report.shards_added:,} shards added, {change}; {report.rows:,} rows, "
                  f"{report.tokens:,} tokens in {report.chunks:,} chunks")  # fmt: skip
    _finish(asdict(report), json_)


@app.command()
def check(
    job: Path,
    setting: Settings = None,
    offline: Annotated[bool, typer.Option(help="Leave out datasets, stores and machines")] = False,
    cluster: Annotated[
        Path | None, typer.Option(help="The file of the cluster that the job is for; the default is this machine")
    ] = None,
) -> None:
    """Find everything wrong with a job before anything starts."""
    from heliostat import check as checks

    if offline:
        checks.check_file(job, setting)
        out.print(f"{job}: the file and the model are right; datasets, stores and machines were not looked at")
        return
    checked = checks.check(job, setting)
    checks.check_devices(checked.job, cluster)
    shape, steps, samples = checked.plan.shape, checked.job.train.steps, int(checked.order.epoch_samples.sum())
    out.print(f"{job}: right. {samples:,} training samples, {steps * shape.batch / samples:.2f} epochs in {steps:,} steps; "
              f"{shape.lanes} lanes, supersteps of {shape.superstep} steps, windows of {shape.window:,} samples")  # fmt: skip


@app.command()
def train(
    job: Annotated[Path | None, typer.Argument(help="A job file; none with --from-sweep")] = None,
    setting: Settings = None,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last checkpoint, if there is one")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete the run of this name and start anew")] = False,
    allow_data_change: Annotated[bool, typer.Option(help="Resume with other data: a new segment of the run")] = False,
    alias: Annotated[str | None, typer.Option(help="That the registered model gets, as candidate (mlflow.alias)")] = None,
    dry_run: Annotated[bool, typer.Option(help="Train nothing: work out every rank's share, in this process alone")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="For --dry-run: as many ranks, instead of workers.count")] = None,
    from_sweep: Annotated[str | None, typer.Option(help="A sweep's folder or name: train the job that it found")] = None,
    best: Annotated[bool, typer.Option("--best", help="With --from-sweep: the job of its best trial")] = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a job: Ray Data streams its samples into DeepSpeed workers; the model ends in MLflow."""
    setting = [*(setting or []), *([f"mlflow.alias={alias}"] if alias else [])]
    if (job is None) == (from_sweep is None) or best != (from_sweep is not None):
        raise ConfigError("give a job file, or --from-sweep SWEEP --best")
    if from_sweep is not None:
        from heliostat.cli_tune import write_best

        job = write_best(from_sweep)
    assert job
    if dry_run:
        from heliostat.cli_plan import show_dry_run

        show_dry_run(job, setting, workers, json_)
        return
    if workers is not None:
        raise ConfigError("--workers goes with --dry-run; to train with another number use --set workers.count=N")
    from heliostat.train.run import train as run

    result = run(job, setting, resume, overwrite, allow_data_change, verbose, started=psutil.Process().create_time())
    if not json_:
        _print_result(result)
    _finish(result, json_)


def _print_result(result: dict[str, Any]) -> None:
    for sample in result["samples"]:
        out.rule(f"prompt: {sample['prompt']!r}", align="left")
        out.print(sample["prompt"] + sample["text"], markup=False)
    out.rule()
    if result["eval"]:
        scores = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in result["eval"].items())
        out.print(f"held-out: {scores}")
    for name, entropy in result["reference"].items():
        if entropy:
            out.print(f"for comparison: the unigram entropy of {name} is {entropy:.4g} nats a token")
    split = ", ".join(f"{k.replace('_', ' ')} {v:.1f}" for k, v in result["startup"].items())
    split = f" ({split})" if split else ""  # it went with a driver that died behind the last step
    out.print(f"{result['tokens_per_second']:,.0f} {result['unit']}/s, data wait {result['data_wait']:.2%}; "
              f"{result['seconds_to_first_step']:.1f} s to the first step{split}")  # fmt: skip
    if "goodput" in result:  # a run of an older version has none
        from heliostat.runs import goodput as accounting

        out.print(accounting.line(result["goodput"]))
    out.print(f"model {result['model_uri'] or 'not logged'}, run {result['run_id']}, checkpoint {result['checkpoint']}")
    prompt = result["samples"][0]["prompt"] if result["samples"] else ""
    if not result["model_uri"]:
        out.print("\nNext:  heliostat ui")
        return
    name = result["run_id"] if result["model_uri"].startswith("models:/m-") else result["model_uri"]  # not registered: by its run
    out.print(f"\nNext:  heliostat generate {name} --prompt '{prompt}'\n       heliostat ui")


@app.command()
def generate(
    model: str,
    prompt: Annotated[str | None, typer.Option()] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line: answered with Ray Data, into --out")] = None,
    seed: int = 0,
    to: Annotated[
        str | None, typer.Option("--out", help="Where the answer goes; an image needs it, and so does --prompts (a folder)")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="With --prompts")] = 1,
    max_tokens: Annotated[int | None, typer.Option(help="Text: at most so many")] = None,
    temperature: Annotated[float | None, typer.Option(help="Text: 0 takes the likeliest token each time")] = None,
    top_p: Annotated[float | None, typer.Option(help="Text")] = None,
    steps: Annotated[int | None, typer.Option(help="Images: of the sampler")] = None,
    guidance: Annotated[float | None, typer.Option(help="Images: how strictly to follow the prompt; 1 is plain")] = None,
    sampler: Annotated[str | None, typer.Option(help="Images: ddpm, ddim, dpm++ or euler")] = None,
    grid: Annotated[int | None, typer.Option(help="Images: so many, side by side")] = None,
    width: Annotated[int | None, typer.Option(help="Images: in pixels")] = None,
    height: Annotated[int | None, typer.Option(help="Images: in pixels")] = None,
    mlflow: TrackingUri = None,
    json_: Json = False,
) -> None:
    """Let a model write or draw. MODEL: models:/NAME/VERSION, a run id, or a folder."""
    from heliostat.inference import generate as generating
    from heliostat.track.models import resolve

    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "steps": steps, "guidance": guidance,
             "sampler": sampler, "grid": grid, "width": width, "height": height}  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if (prompt is None) == (prompts is None):
        raise ConfigError("--prompt: give either one prompt, or a file of them with --prompts")
    if prompts is not None:
        if to is None:
            raise ConfigError("--out: is needed with --prompts; give a folder or an s3:// prefix")
        asked = generating.read_prompts(prompts)
        count = generating.generate_many(resolve(model, _store(mlflow)), asked, options, seed, to, workers)
        if not json_:
            out.print(f"{count:,} answers are in {to}/{generating.RESULTS}", markup=False)
        _finish({"count": count, "results": f"{to}/{generating.RESULTS}"}, json_)
        return
    made = generating.generate(resolve(model, _store(mlflow)), str(prompt), options, seed, to)
    if not json_:
        out.print(made.shown, markup=False)
    _finish({"prompt": made.prompt, **made.facts}, json_)


@app.command()
def evaluate(
    model: str,
    data: Annotated[str, typer.Option(help="A prepared dataset: a folder or s3:// URI")],
    samples: Annotated[int, typer.Option(min=1)] = 256,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="The default is the model's own")] = None,
    fraction: Annotated[
        float | None, typer.Option(min=0.0001, max=0.9999, help="Held-out fraction; the default is the job's, or 0.01")
    ] = None,
    mlflow: TrackingUri = None,
    json_: Json = False,
) -> None:
    """Score a model on a dataset's held-out split. MODEL: models:/NAME/VERSION, a run id, or a folder."""
    from heliostat.inference.evaluate import evaluate as run
    from heliostat.track.models import resolve

    scores = run(resolve(model, _store(mlflow)), data, samples, sequence_length, fraction)
    if not json_:
        out.print("  ".join(f"{k.replace('_', ' ')} {v:.6g}" for k, v in scores.items()))
    _finish(scores, json_)


@app.command()
def export(
    run: Run,
    to: Annotated[Path, typer.Option()],
    step: int | None = None,
    mlflow: TrackingUri = None,
    json_: Json = False,
) -> None:
    """Write a run's checkpoint as a Hugging Face folder."""
    from heliostat.checkpoint import saver
    from heliostat.inference import export as exporting
    from heliostat.runs.mlflow_id import record
    from heliostat.track.models import find_run

    place = find_run(run, _store(mlflow))
    found = saver.open_checkpoint(place, step) if step is not None else saver.latest(place)
    if found is None:
        raise ConfigError(f"{place}: holds no complete checkpoint")
    exporting.export(found, to, record(place).get("run_id"))
    if not json_:
        out.print(f"step {found.step} of {found.index['name']} is in {to}")
    _finish({"folder": str(to), "step": found.step}, json_)


@app.command()
def checkpoints(run: Run, mlflow: TrackingUri = None, json_: Json = False) -> None:
    """List a run's checkpoints: what each is, whether it is whole, and which rule keeps it."""
    from heliostat.checkpoint.retention import survey
    from heliostat.track.models import find_run

    place = find_run(run, _store(mlflow))
    rows = survey(place)
    if not json_:
        _print_checkpoints(rows)
    _finish({"run_folder": str(place), "checkpoints": rows}, json_)


def _print_checkpoints(rows: list[dict[str, Any]]) -> None:
    table = [("step", "written", "MB", "workers", "ZeRO", "kept as", "scores")]
    for row in rows:
        facts = (f"{row['step']:,}", "torn", f"{row['bytes'] / 1e6:,.1f}", "", "", "", row["fault"])
        if row["whole"]:
            written = datetime.fromtimestamp(row["written"]).isoformat(sep=" ", timespec="seconds")
            scores = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row["metrics"].items() if v is not None)
            shape = (str(row["world_size"]), str(row["zero_stage"]))
            facts = (facts[0], written, facts[2], *shape, ", ".join(row["kept"]) or "not kept on", scores)
        table.append(facts)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]) - 1)]
    for line in table:
        cells = [
            text.ljust(width) if i in (1, 5) else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=False))
        ]
        out.print("  ".join([*cells, line[-1]]).rstrip(), markup=False)


@app.command()
def verify(run: Run, mlflow: TrackingUri = None, json_: Json = False) -> None:
    """Check a run's receipts against its datasets: what every step trained on, and that nothing was lost or repeated."""
    from heliostat.runs import verify as verifying
    from heliostat.track.models import find_run

    place = find_run(run, _store(mlflow))
    report = verifying.verify(place)
    if not json_:
        out.print(f"{report['steps']:,} steps are as their receipts say: {report['samples']:,} samples, {report['lost']:,} lost, "
                  f"{report['repeated']:,} repeated, {report['replaced']:,} bad ones replaced")  # fmt: skip
    _finish(report, json_)
    if not report["ok"]:
        raise VerifyError(f"{place}: {verifying.explain(report)}")


@app.command()
def goodput(run: Run, mlflow: TrackingUri = None, json_: Json = False) -> None:
    """Tell where a run's time went, from the command's start to the end, over all its restarts: parts that add up to 100 %."""
    from heliostat.runs import goodput as accounting
    from heliostat.track.models import find_run
    from heliostat.track.reconcile import settle_folder

    place = find_run(run, _store(mlflow))
    settle_folder(place)
    report = accounting.read_report(place)
    if not json_:
        rows = accounting.table(report)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            out.print("  ".join(cells), markup=False)
    _finish(report, json_)


@app.command()
def samples(
    run: Run,
    step: Annotated[int, typer.Option(min=0, help="The first is 0")],
    full: Annotated[bool, typer.Option(help="Show each sample's whole text")] = False,
    mlflow: TrackingUri = None,
    json_: Json = False,
) -> None:
    """Show the samples that a step trained on: their places in the datasets, and their text."""
    from heliostat.runs.samples import samples as read
    from heliostat.track.models import find_run

    found = read(find_run(run, _store(mlflow)), step)
    if not json_:
        for sample in found:
            _print_sample(sample, full)
    _finish({"step": step, "samples": found}, json_)


def _print_sample(sample: dict[str, Any], full: bool) -> None:
    where = "lane {lane}, place {place}: {source}/{shard}, row group {row_group}, row {row}, epoch {epoch}"
    out.print(where.format(**sample), markup=False, style="bold")
    if bad := sample["replaces"]:
        out.print(f"  in place of {bad['shard']}, row group {bad['row_group']}, row {bad['row']}: {bad['reason']}", markup=False)
    text = sample["text"]
    out.print(text if full else "  " + json.dumps(text[:200], ensure_ascii=False) + (" ..." if text[200:] else ""), markup=False)


app.command()(chaos)


@app.command()
def ui(mlflow: TrackingUri = None, host: str = "127.0.0.1", port: int = 5000) -> None:
    """Open MLflow's UI on the runs' store, and print its address."""
    from heliostat.track.ui import serve

    serve(_store(mlflow), host, port)


def _store(uri: str | None) -> str:
    if uri and carries_secret(uri):
        raise ConfigError(
            "--mlflow: carries a password, which every user of this machine can see; set MLFLOW_TRACKING_URI instead, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT_STORE).absolute()}"


def _finish(result: dict[str, Any], json_: bool) -> None:
    if json_:
        sys.stdout.write(json.dumps(result) + "\n")


from heliostat import cli_cluster, cli_plan, cli_track, cli_tune  # noqa: E402, F401 (they register their commands, and need what is above)


def main() -> None:
    verbose = "--verbose" in sys.argv or "-v" in sys.argv
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, markup=False)
        handler.setFormatter(Lines("%(message)s", "%H:%M:%S"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(Lines("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = excepthook
    logging.getLogger("heliostat").setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        app()
    except HeliostatError as e:
        if verbose:
            logging.getLogger("heliostat").exception("traceback")
        sys.stderr.write(f"error: {printable(str(e), lines=True)}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except SystemExit as e:
        if e.code == 130:  # typer makes it of Ctrl-C, and says nothing
            sys.stderr.write("interrupted\n")
        raise
    finally:
        atexit.register(_nothing_more)  # now, so that it comes before the exit of what a command has imported


def _nothing_more() -> None:
    """The result is the last line of standard output: Ray, as it ends, may have something to say after it."""
    sys.stdout.flush()
    sys.stdout = sys.stderr
