"""Defines options and arguments that several commands share, so that their help is written only once.

An option that only one module of commands uses is defined in that module, not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from heliostat.cli import completion


def flag(*names: str, help: str, **more: Any) -> Any:
    """Defines an option without a value."""
    return typer.Option(*names, help=help, metavar="", **more)


def argument(metavar: str, help: str, autocompletion: Any = None, **more: Any) -> Any:
    """Defines an argument whose default, if there is one, isn't shown."""
    return typer.Argument(metavar=metavar, help=help, show_default=False, autocompletion=autocompletion, **more)


JobFile = Annotated[Path, argument("JOB", "A job file, such as jobs/quickstart.yaml", completion.job_files)]
Run = Annotated[str, argument("RUN", "A run id, or a run's folder (STORAGE/NAME)", completion.runs)]
Model = Annotated[str, argument("MODEL", "models:/NAME/VERSION, a run id, or a model's folder", completion.models)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the file; may be repeated")
]
Verbose = Annotated[bool, flag("--verbose", "-v", help="Show the logs of Ray and of the workers, and tracebacks")]
OnCluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        "-c",
        metavar="CLUSTER",
        help="File or name of a cluster that runs on this machine",
        show_default="$RAY_ADDRESS, or none",
        autocompletion=completion.clusters,
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--mlflow", metavar="URI", help="MLflow tracking URI", show_default="$MLFLOW_TRACKING_URI, else .heliostat/mlflow.db"
    ),
]
Prices = Annotated[
    Path | None, typer.Option("--prices", metavar="FILE", help="A YAML file that changes the price table (docs/plan.md)")
]
Dataset = Annotated[str, argument("DATASET", "A prepared dataset: a folder or s3:// URI", completion.datasets)]
TextDataset = Annotated[str, argument("DATASET", "A prepared dataset of text: a folder or s3:// URI", completion.datasets)]
Resume = Annotated[bool, flag("--resume", help="Resume from the run's last checkpoint, if there is one")]
Overwrite = Annotated[bool, flag("--overwrite", help="Delete the run of this name and start from scratch")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Text: maximum number of new tokens")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Text: sampling temperature; 0 always takes the likeliest token")
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Text: sample from the likeliest tokens of this total probability (top-p)")
]
Engine = Annotated[str, typer.Option("--engine", help="auto, transformers, or vllm; auto uses vllm if it can run the model")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed; the same seed gives the same answers")]
Embedder = Annotated[
    str | None, typer.Option("--embedder", metavar="MODEL", help="New folder of the index's embedder, if the embedder has moved")
]
Reranker = Annotated[
    str | None, typer.Option("--reranker", metavar="MODEL", help="A cross-encoder that sorts the passages that the index finds")
]
Keys = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="A file of API keys. Each line is KEY, or NAME and KEY. heliostat creates a missing file, with a new key",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        "-c",
        metavar="CLUSTER",
        help="A cluster file, an address, or a local cluster's name",
        autocompletion=completion.clusters,
    ),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option(
        "--cluster",
        "-c",
        metavar="FILE",
        help="A cluster file",
        show_default="this machine",
        autocompletion=completion.cluster_files,
    ),
]
Queue = Annotated[str | None, typer.Option(metavar="NAME", help="Jobs of one queue run one after another")]
Follow = Annotated[bool, flag("--follow", "-f", help="Show the log until the job ends; the exit code shows the job's outcome")]
