"""Runs models on inputs, and imports and exports models: `heliostat model` generate, infer, evaluate, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli import completion
from heliostat.cli.common import command, finish, model_folder, out, run_folder
from heliostat.cli.groups import MODEL
from heliostat.cli.options import Engine, MaxTokens, Model, OnCluster, Run, Seed, Temperature, TopP, TrackingUri, argument
from heliostat.errors import ConfigError


@command(MODEL, example="models:/quickstart-lm/1 --prompt 'class '")
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option(help="Text for the model to continue, or description of the image to generate")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one prompt per line; needs --out")] = None,
    prefix: Annotated[str | None, typer.Option(help="Text before the answer: a file, or the text itself")] = None,
    suffix: Annotated[str | None, typer.Option(help="Text after the answer: a file, or the text itself")] = None,
    seed: Seed = 0,
    to: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="FILE", help="File to write the answer to; with --prompts, a folder to write the answers to"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="With --prompts: number of models that run in parallel")] = 1,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    no_chat: Annotated[bool, typer.Option("--no-chat", help="Continue the prompt without the model's chat template")] = False,
    steps: Annotated[int | None, typer.Option(help="Images: sampler steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="Images: classifier-free guidance scale; 1 turns guidance off")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Images: lowest and highest time with guidance, from 0 (image) to 1 (noise)", metavar="LOW HIGH"),
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="Images: how much of the contrast that guidance adds to undo, from 0 to 1")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Images: ddpm, ddim, dpm++, or euler")] = None,
    grid: Annotated[int | None, typer.Option(help="Images: number of images, in one row")] = None,
    width: Annotated[int | None, typer.Option(help="Images: width in pixels")] = None,
    height: Annotated[int | None, typer.Option(help="Images: height in pixels")] = None,
    mlflow: TrackingUri = None,
) -> None:
    """Generate text or images."""
    import heliostat.inference.generate as generating

    flags = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "chat": False if no_chat else None,
             "steps": steps, "guidance": guidance, "guidance_interval": guidance_interval,
             "guidance_rescale": guidance_rescale, "sampler": sampler, "grid": grid, "width": width,
             "height": height}  # fmt: skip
    options: dict[str, object] = {name: value for name, value in flags.items() if value is not None}
    if [prompt, prompts, prefix].count(None) != 2:
        raise ConfigError(
            "--prompt: the command needs one prompt. Pass exactly one of --prompt TEXT, --prompts FILE, and --prefix with "
            "--suffix"
        )
    if (prefix is None) != (suffix is None):
        missing = "--suffix" if suffix is None else "--prefix"
        raise ConfigError(f"{missing}: is missing. Pass both --prefix and --suffix (one may be empty)")
    if prefix is not None and suffix is not None:
        prompt, options["suffix"] = generating.read_text("--prefix", prefix), generating.read_text("--suffix", suffix)
    if prompts is not None:
        if to is None:
            raise ConfigError("--out: is required with --prompts. Pass a folder or an s3:// prefix")
        from heliostat.inference.many import generate_many

        texts = generating.read_prompts(prompts)
        count = generate_many(model_folder(model, mlflow), texts, options, seed, to, workers, out.quiet)
        out.print(f"{count:,} answers are in {to}/{generating.RESULTS}")
        finish({"count": count, "results": f"{to}/{generating.RESULTS}"})
        return
    result = generating.generate(model_folder(model, mlflow), str(prompt), options, seed, to)
    out.print(result.shown)
    finish({"prompt": result.prompt, **result.facts})


@command(MODEL, example="models:/quickstart-lm/1 --input questions.jsonl --out answers")
def infer(
    model: Model,
    input_: Annotated[
        str,
        typer.Option("--input", metavar="PATH", help="Input documents: a file, folder, glob, or s3:// URI", show_default=False),
    ],
    to: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="Folder of the answers, or s3://BUCKET/PREFIX", show_default=False)
    ],
    task: Annotated[str, typer.Option(help="continue, chat, score, embed, classify, or embed-images")] = "continue",
    column: Annotated[
        str,
        typer.Option(
            help="Column of the input", show_default="text, with --task chat: messages, with --task embed-images: image"
        ),
    ] = "",
    keep: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Copy this column of the input to the output; may be repeated")
    ] = None,
    seed: Seed = 0,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    batch: Annotated[int, typer.Option(help="Batch size of the model, in inputs")] = 16,
    engine: Engine = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Without a cluster: number of models that run in parallel")] = 2,
    cluster: OnCluster = None,
    mlflow: TrackingUri = None,
) -> None:
    """Run a model over all documents of an input. If the command is killed, run the command again to resume."""
    from heliostat.cluster.endpoint import join

    join(cluster)
    from heliostat.inference.batch.run import infer as run
    from heliostat.inference.batch.tasks import BatchSettings
    from heliostat.inference.sampling import WRITES
    from heliostat.plan import hardware
    from heliostat.schema import validate

    options = {k: v for k, v in {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}.items() if v is not None}
    if options and task not in WRITES:
        option = next(iter(options)).replace("_", "-")
        raise ConfigError(f"--{option}: has an effect only with --task {' or '.join(WRITES)} ({task}). Remove this option")
    settings = {"task": task, "column": column, "keep": keep or [], "seed": seed, "batch": batch, "options": options}
    checked = validate(BatchSettings, settings, "infer")
    run_ = run(model_folder(model, mlflow), input_, to, checked, workers, out.quiet, engine)
    prices = hardware.table()
    run_ |= {"cost": hardware.cost(run_["devices"], prices), "currency": prices["currency"]}
    without = f", {run_['bad']:,} inputs have no answer (bad.parquet)" if run_["bad"] else ""
    cut = f", {run_['truncated']:,} of them to inputs that were cut" if run_["truncated"] else ""
    many, what = (run_["answers"], "images") if task == "embed-images" else (run_["tokens"], "tokens")
    pace = f"{many:,} {what}, {many / max(run_['seconds'], 0.1):,.0f} per second"
    cost = "unknown (the price table lacks this GPU)" if run_["cost"] is None else f"{run_['cost']:,.2f} {run_['currency']}"
    out.print(f"{run_['answers']:,} answers are in {to}/answers{cut}{without}; {pace}; cost {cost}")
    if run_["deleted"]:
        out.print(f"{run_['deleted']:,} answers are deleted, because the inputs changed or no longer exist")
    finish(run_)


@command(MODEL, example="models:/quickstart-lm/1 --dataset .heliostat/data/quickstart")
def evaluate(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            "--dataset",
            metavar="DATASET",
            help="A prepared dataset: a folder or s3:// URI",
            show_default=False,
            autocompletion=completion.datasets,
        ),
    ],
    samples: Annotated[int, typer.Option(min=1, help="Maximum number of held-out samples")] = 256,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="Tokens per sample", show_default="the model's own")] = None,
    fraction: Annotated[
        float | None,
        typer.Option(min=0.0001, max=0.9999, help="Fraction of the dataset that is held out", show_default="the job's, or 0.01"),
    ] = None,
    mlflow: TrackingUri = None,
) -> None:
    """Score a model on a dataset's held-out split. For image models, also score generated images."""
    from heliostat.evaluation import pictures
    from heliostat.evaluation.losses import evaluate as run

    scores = run(model_folder(model, mlflow), data, samples, sequence_length, fraction)
    out.print(pictures.line(scores))
    finish(scores)


@command(MODEL, example=".heliostat/runs/quickstart --out my-model")
def export(
    run: Run,
    to: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder to write; it must be empty or missing", show_default=False)
    ],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint", show_default="the newest")] = None,
    adapter: Annotated[
        bool,
        typer.Option("--adapter/--merge", help="Write only the adapter of a run with model.adapter, or merge it into its base"),
    ] = False,
    ema_length: Annotated[
        float | None,
        typer.Option(help="Length of the average, for example 0.07 (docs/post-hoc-ema.md)", show_default="the run's average"),
    ] = None,
    mlflow: TrackingUri = None,
) -> None:
    """Write a run's checkpoint as a Hugging Face folder."""
    from heliostat.checkpoint import layout
    from heliostat.inference import export as exporting
    from heliostat.inference import post_hoc
    from heliostat.runs import exports
    from heliostat.tracking.logger import record

    place = run_folder(run, mlflow)
    if step is not None and step not in (steps := layout.steps(place)):
        have = f"Use one of {', '.join(map(str, steps))}" if steps else "The run has no checkpoint yet"
        raise ConfigError(f"--step: {place} has no checkpoint of this step ({step}). {have}")
    checkpoint = layout.open_checkpoint(place, step) if step is not None else layout.latest(place)
    if checkpoint is None:
        raise ConfigError(f"{place}: has no complete checkpoint. Run: heliostat run checkpoints {place}")
    average = post_hoc.average(place, checkpoint, ema_length) if ema_length is not None else None
    exporting.export(checkpoint, to, record(place).get("run_id"), adapter, average)
    exports.add(place, to, checkpoint.step, adapter)
    what = "the adapter of step" if adapter else "step"
    out.print(f"{what} {checkpoint.step} of {checkpoint.index.name} is in {to}")
    facts: dict[str, object] = {}
    if average:
        facts = {"ema_length": average.length, "ema_error": average.error, "snapshots": average.steps}
        count = len(average.steps)
        out.print(f"average of length {average.length:g} from {count} snapshots, error of its profile {average.error:.2%}")
    finish({"folder": str(to), "step": checkpoint.step, **facts})


@command(MODEL, "import", example="models/SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2")
def import_(
    path: Annotated[Path, argument("PATH", "A GGUF file, or a folder with one GGUF file")],
    to: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder to write; it must be empty or missing", show_default=False)
    ],
) -> None:
    """Convert a GGUF file to a Hugging Face folder, and compare the outputs of both."""
    from heliostat.inference import importing

    imported = importing.convert(path, to)
    for line in importing.facts(imported):
        out.print(line)
    out.print(f"the model is in {to}")
    file = imported.file
    finish({
        "folder": str(to), "file": str(file.path), "sha256": imported.digest, "architecture": file.architecture,
        "types": file.types, "bits_per_weight": file.bits, "precision": file.precision, "difference": imported.difference,
        "spread": imported.spread, "agreement": imported.agreement, "chat_template": imported.has_template,
    })  # fmt: skip
