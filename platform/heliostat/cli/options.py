"""Defines the options and arguments that mean the same in several commands, so that their help is written once.

Modules of commands add those that only they have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

DATA, TRAINING, MODELS, RUNS = "Data", "Training", "Models", "Runs"  # headings of `heliostat --help`
SWEEPS, CLUSTERS, JOBS = "Sweeps", "Clusters", "Jobs on clusters"
PANELS = (DATA, TRAINING, MODELS, RUNS, SWEEPS, CLUSTERS, JOBS)  # in this order


def flag(*names: str, help: str, **more: Any) -> Any:
    """Makes an option without a value."""
    return typer.Option(*names, help=help, metavar="", **more)


JobFile = Annotated[Path, typer.Argument(help="A job file, for example jobs/quickstart.yaml", metavar="JOB", show_default=False)]
Run = Annotated[str, typer.Argument(help="A run id, or a run's folder (STORAGE/NAME)", metavar="RUN", show_default=False)]
Model = Annotated[
    str, typer.Argument(help="models:/NAME/VERSION, a run id, or a model's folder", metavar="MODEL", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the file, such as train.optimizer.lr=1e-3; may be repeated"),
]
Verbose = Annotated[bool, flag("--verbose", "-v", help="Show the logs of Ray and of the workers, and tracebacks")]
OnCluster = Annotated[
    str | None,
    typer.Option(
        "--cluster", "-c", help="A cluster that runs on this machine: its file or name; the default is RAY_ADDRESS, or none"
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option("--mlflow", metavar="URI", help="MLflow tracking URI; the default is MLFLOW_TRACKING_URI or the quickstart's"),
]
Prices = Annotated[Path | None, typer.Option("--prices", help="A YAML file laid over the price table (docs/plan.md)")]
Dataset = Annotated[str, typer.Argument(help="A prepared dataset: a folder or s3:// URI", metavar="DATASET", show_default=False)]
TextDataset = Annotated[
    str, typer.Argument(help="A prepared dataset of text: a folder or s3:// URI", metavar="DATASET", show_default=False)
]
Resume = Annotated[bool, flag("--resume", help="Resume from the run's last checkpoint, if there is one")]
Overwrite = Annotated[bool, flag("--overwrite", help="Delete the run of this name and start from scratch")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Text: the largest number of tokens")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="Text: 0 always takes the likeliest token")]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Text: sample from the likeliest tokens of this total probability (top-p)"),
]
Engine = Annotated[str, typer.Option("--engine", help="auto, transformers or vllm; auto is vllm where that works")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed; the same seed gives the same answers")]
Embedder = Annotated[
    str | None, typer.Option("--embedder", metavar="MODEL", help="The folder of the index's embedder, if it has moved")
]
Reranker = Annotated[
    str | None, typer.Option("--reranker", metavar="MODEL", help="A cross-encoder that orders what the index finds")
]
Keys = Annotated[
    Path, typer.Option(help="A file of API keys, one KEY or NAME KEY per line; if it is missing, it is made with a new key")
]
Target = Annotated[str | None, typer.Option("--cluster", "-c", help="A cluster file, an address, or a local cluster's name")]
Queue = Annotated[str | None, typer.Option(help="Jobs of one queue run one after another")]
Follow = Annotated[bool, flag("--follow", "-f", help="Show the log until the job is over; its outcome is the exit code")]
