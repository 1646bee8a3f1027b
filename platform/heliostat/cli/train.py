"""Checks and trains jobs, and injects faults into runs: `heliostat check`, `train`, `debug chaos`."""

from __future__ import annotations

import json
import logging
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import completion
from heliostat.cli.common import Report, command, finish, out, print_table, program, store_uri
from heliostat.cli.groups import DEBUG, TOP
from heliostat.cli.options import ClusterFile, JobFile, Overwrite, Resume, Settings, Verbose, argument, flag
from heliostat.errors import ConfigError, NumericsError, VerifyError
from heliostat.terminal import console

if TYPE_CHECKING:
    from heliostat.config.spec import Job
    from heliostat.runs.summary import Ending
    from heliostat.validation.check import Checked

log = logging.getLogger(__name__)

SHOWN = 8  # maximum number of differences that `check --numerics` prints
HEADS = {
    "fault": "fault", "detected_s": "detected after", "recovered_s": "recovered after", "recomputed_steps": "steps recomputed",
    "lost": "samples lost", "repeated": "samples repeated", "loss_difference": "final loss difference", "goodput": "goodput",
}  # fmt: skip
ISSUE = "kill-worker,kill-node,hang,sigterm,s3-503,corrupt-shard,torn-checkpoint,mlflow-down,disk-full"


@command(TOP, example="jobs/quickstart.yaml --set train.steps=50")
def check(
    job: JobFile,
    setting: Settings = None,
    offline: Annotated[bool, flag("--offline", help="Don't check datasets, stores, and machines")] = False,
    cluster: ClusterFile = None,
    numerics: Annotated[
        bool,
        flag("--numerics", help="Run some steps on two workers here, and compare the numbers with one plain process in fp32"),
    ] = False,
) -> None:
    """Find everything wrong with a job before anything starts."""
    from heliostat.validation import check as checks

    if numerics and offline:
        raise ConfigError("--numerics: not with --offline, because it needs the job's samples. Remove one of the two")
    from heliostat.plan import auto

    wanted, checked, filled = checks.check_path(job, setting, cluster, offline, partial(auto.settled, cluster=cluster))
    result: dict[str, object] = {"file": str(job), "name": wanted.name, "offline": offline}
    result["defaults"] = [default._asdict() for default in filled]
    if checked is None:
        right = "the file and the model are right; datasets, stores, and machines were not checked"
    else:
        shape, steps, samples = checked.plan.shape, checked.job.train.steps, int(checked.order.epoch_samples.sum())
        epochs = steps * shape.batch / samples
        result |= {"samples": samples, "steps": steps, "epochs": epochs, "lanes": shape.lanes,
                  "steps_per_block": shape.steps_per_block, "window": shape.window}  # fmt: skip
        if checked.audit:
            from heliostat.validation import audit_lines

            result["audit"] = checked.audit
            for line in audit_lines.lines(checked.audit, out.is_terminal and not out.no_color):
                out.print(line)
        right = (f"right. {samples:,} training samples, {epochs:.2f} epochs in {steps:,} steps; "
                f"{shape.lanes} virtual ranks, blocks of {shape.steps_per_block} steps, "
                f"shuffle windows of {shape.window:,} samples")  # fmt: skip
    if filled:
        out.print("defaults that follow from this job, this machine, or the dataset:")
        print_table([[d.key, _plain(d.value), d.why] for d in filled], left=range(3))
    out.print(f"{job}: {right}")
    fault = None
    if numerics:
        assert checked
        result["numerics"], fault = _show_numerics(job, checked)
    finish(result, fault)


def _plain(value: object) -> str:
    """Formats a default in the syntax of a job file."""
    return json.dumps(value).replace('"', "") if isinstance(value, dict) else str(value)


def _show_numerics(job: Path, checked: Checked) -> tuple[Report, NumericsError | None]:
    """Compares a job's numbers with the numbers of one plain process, and prints the comparison. Returns the report, and an error
    if the numbers differ."""
    from heliostat.numerics import check as numerics

    with console.status("running some steps on two workers, and in one plain process"):
        result = numerics.check(checked)
    for line in _recomputed(result["trial"]):
        out.print(line)
    print_table(_table(result["rows"]), left=(0, 4))
    if result["ok"]:
        limits = f"within the limits of {result['trial']['precision']}"
        out.print(f"{job}: the numbers are the same as in one plain process of torch in fp32, {limits}")
        return result, None
    return result, NumericsError(f"{job}: {explain(result['faults'])}")


def _recomputed(t: Report) -> list[str]:
    where = "GPUs" if t["gpus"] else "CPUs"
    tokens = f" of {t['sequence_length']:,} tokens" if t["sequence_length"] else ""
    return [
        f"{t['model']}; {t['optimizer']}, {t['precision']}, ZeRO stage {t['stage']}, {t['workers']} workers on {where}",
        f"{t['steps']} steps of {t['global_batch_size']} samples{tokens} in micro-batches of {t['micro_batch_size']}; "
        f"the steps from {t['resumed']['step']} on run a second time, resumed on "
        f"{t['resumed']['workers']} worker at stage {t['resumed']['stage']}",
    ]


def _table(rows: list[Report]) -> list[list[str]]:
    head = ["", "compared", "worst", "limit", "where"]
    return [head, *([r["what"], f"{r['count']:,}", _number(r["worst"]), _number(r["limit"]), _where(r)] for r in rows)]


def _where(row: Report) -> str:
    return ("" if row["worst"] == 0 else row["where"]) + (f"  DIFFERS ({row['faults']})" if row["faults"] else "")


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def explain(faults: list[Report]) -> str:
    """Lists the differences, sorted by step. Within a step, differences with a known cause come first, then the largest
    differences."""
    ordered = sorted(faults, key=lambda f: (f["step"], not f["cause"], -f["difference"]))
    more = f"\n  and {len(ordered) - SHOWN:,} more" if len(ordered) > SHOWN else ""
    return "the numbers differ from those of one plain process\n  " + "\n  ".join(f["text"] for f in ordered[:SHOWN]) + more


@command(TOP, example="jobs/quickstart.yaml --set train.steps=50")
def train(
    job: Annotated[Path | None, argument("JOB", "A job file; leave out JOB with --from-sweep", completion.job_files)] = None,
    setting: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_data_change: Annotated[
        bool, flag("--allow-data-change", help="Allow the run to resume on other data; the run gets a new segment")
    ] = False,
    alias: Annotated[
        str | None, typer.Option(metavar="NAME", help="Alias to assign to the registered model (mlflow.alias)")
    ] = None,
    dry_run: Annotated[bool, flag("--dry-run", help="Don't train; compute in this process what each rank would do")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="With --dry-run: the number of ranks")] = None,
    from_sweep: Annotated[
        str | None,
        typer.Option(
            metavar="SWEEP", help="Train a job of this sweep; pass the sweep's folder or name", autocompletion=completion.sweeps
        ),
    ] = None,
    best: Annotated[bool, flag("--best", help="With --from-sweep: train the job of the best trial")] = False,
    verbose: Verbose = False,
) -> None:
    """Train a job on Ray and DeepSpeed, recorded in MLflow. Ray Data streams the samples to the workers."""
    setting = [*(setting or []), *([f"mlflow.alias={alias}"] if alias else [])]
    if (job is None) == (from_sweep is None) or best != (from_sweep is not None):
        raise ConfigError(
            "JOB: the command needs one job. Run: heliostat train jobs/quickstart.yaml, or "
            "heliostat train --from-sweep SWEEP --best"
        )
    if from_sweep is not None:
        from heliostat.cli.tune import write_best

        job = write_best(from_sweep)
    assert job
    if dry_run:
        from heliostat.cli.plan import show_dry_run

        show_dry_run(job, setting, workers)
        return
    if workers is not None:
        raise ConfigError(f"--workers: only with --dry-run ({workers}). Use --set workers.count={workers} to train")
    import psutil

    from heliostat.plan import auto
    from heliostat.training.run import source, train_job
    from heliostat.validation.check import load_job

    wanted, began = auto.settled(load_job(job, setting, resume=resume), resume=resume), psutil.Process().create_time()
    usual = store_uri(None)  # read before training, because MLflow sets the environment variable to the job's store
    result = train_job(wanted, resume, overwrite, allow_data_change, verbose, tags=source(job), started=began)
    _print_result(result)
    out.print(
        "\n" + "\n".join(f"{'Next:  ' if i == 0 else ' ' * 7}{c}" for i, c in enumerate(next_commands(result, wanted, usual)))
    )
    finish(result)


def _print_result(result: Ending) -> None:
    for sample in result["samples"]:
        out.rule(f"prompt: {sample['prompt']!r}", align="left")
        out.print(sample["prompt"] + sample["text"])
    out.rule()
    if result["eval"]:
        scores = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in result["eval"].items())
        out.print(f"held-out: {scores}")
    for name, entropy in result["reference"].items():
        if entropy:
            out.print(f"for comparison: the unigram entropy of {name} is {entropy:.4g} nats per token")
    split = ", ".join(f"{k.replace('_', ' ')} {v:.1f}" for k, v in result["startup"].items())
    split = f" ({split})" if split else ""  # empty if the driver that measured it died after the last step
    out.print(f"{result['tokens_per_second']:,.0f} {result['unit']}/s, data wait {result['data_wait']:.2%}; "
              f"{result['seconds_to_first_step']:.1f} s to the first step{split}")  # fmt: skip
    if "goodput" in result:  # runs of older versions have no goodput
        from heliostat.runs import goodput as accounting

        out.print(accounting.line(result["goodput"]))
    out.print(f"model {result['model_uri'] or 'not logged'}, run {result['run_id']}, checkpoint {result['checkpoint']}")


def next_commands(result: Ending, job: Job, usual: str) -> list[str]:
    """Lists the next commands for a run's model and folder. `usual`: the MLflow store that commands use without --mlflow."""
    store = [] if job.mlflow.uri == usual else ["--mlflow", job.mlflow.uri]
    uri = result["model_uri"] or ""  # empty if the recipe logs no model
    model = result["run_id"] if uri.startswith("models:/m-") else uri
    commands = []
    if model and result["samples"]:
        drawn = ["--out", "sample.png"] if result["unit"] == "samples" else []
        sample = result["samples"][0]
        plain = ["--no-chat"] if sample.get("rendered") else []  # runs of older versions don't have the field
        commands.append([program(), "model", "generate", model, *plain, "--prompt", sample["prompt"], *drawn, *store])
    commands.append([program(), "run", "verify", str(job.run_folder)])
    commands.append([program(), "run", "ui", *store])
    return [shlex.join(words) for words in commands]


@command(DEBUG, example="jobs/chaos.yaml --faults kill-worker,hang")
def chaos(
    job: JobFile,
    faults: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Faults to inject: names from the default list, or kill-driver, kill-driver-late, restart-head",
            show_default=ISSUE.replace(",", ", "),
        ),
    ] = ISSUE,
    seed: Annotated[int, typer.Option(help="Random seed for the times and targets of faults")] = 0,
    rate: Annotated[float, typer.Option(min=0.01, max=0.9, help="s3-503: fraction of requests that fail")] = 0.2,
    setting: Settings = None,
) -> None:
    """Inject faults into runs of a job, one fault per run, and compare each with a run without faults."""
    from heliostat.chaos.experiment import chaos as run

    names = [name.strip() for name in faults.split(",") if name.strip()]
    rows, wrong = run(job, names, setting, seed, rate, report=log.info)
    print_table(chaos_table(rows))
    fault = VerifyError("\n  ".join(["some runs ended differently from the run without faults:", *wrong])) if wrong else None
    finish({"faults": rows}, fault)


def chaos_table(rows: list[Report]) -> list[list[str]]:
    """Formats the rows as cells, with the column names first."""
    return [list(HEADS.values()), *(_chaos_cells(row) for row in rows)]


def _chaos_cells(row: Report) -> list[str]:
    def text(key: str, value: object) -> str:
        if value is None:
            return "-"
        if key.endswith("_s"):
            return f"{value:,.1f} s"
        if key == "goodput":
            return f"{value:.1%}"
        return f"{value:.2g}" if key == "loss_difference" else str(value)

    return [text(key, row[key]) for key in HEADS]
