"""Scores an exported model on a dataset's held-out split, in this process, with the scores that training reports."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from heliostat import workspace
from heliostat.data.dataset import open_dataset, plan
from heliostat.data.manifest import read
from heliostat.errors import ConfigError
from heliostat.spec import Job
from heliostat.storage import Location

BATCH = 8


def evaluate(folder: Path, data: str, samples: int, sequence_length: int | None, fraction: float) -> dict[str, float]:
    """The recipe's metrics over `samples` held-out samples: the same ones as in training at the same fraction and length."""
    length = sequence_length or _trained_length(folder)
    if not length:
        raise ConfigError("--sequence-length: the model does not say how long its samples are; give it")
    job = Job.model_validate(
        {
            "name": "evaluate",
            "recipe": "jobs.causal_lm:CausalLM",
            "model": {"pretrained": str(folder)},
            "data": {"sources": [{"path": str(Location(data).absolute(workspace.root()))}], "sequence_length": length},
            "train": {"steps": 1, "global_batch": BATCH, "micro_batch": BATCH, "optimizer": {"lr": 1.0}},
            "evaluate": {"every": 1, "samples": samples, "fraction": fraction},
            "checkpoint": {"every": 1},
            "storage": str(folder),
            "mlflow": {"uri": "sqlite:////dev/null", "experiment": "none"},
        }
    )
    manifests = [read(job.sources[0])]
    recipe = workspace.import_path("recipe", job.recipe)(job)
    recipe.bind(manifests)
    dataset = open_dataset(plan(job, manifests))
    content = dataset.read(dataset.order.held_out(samples))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = recipe.load(folder).eval().to(device)
    sums: dict[str, float] = {}
    with torch.no_grad():
        for i in range(0, len(content), BATCH):
            batch = {k: v.to(device) for k, v in recipe.batch(content[i : i + BATCH]).items()}
            for name, value in recipe.evaluate(model, batch).items():
                sums[name] = sums.get(name, 0.0) + float(value.double().sum())
    return recipe.metrics(sums)


def _trained_length(folder: Path) -> int | None:
    """What an export's tokenizer gives as its longest input: the sequence length of the training."""
    settings = folder / "tokenizer_config.json"
    length = json.loads(settings.read_text()).get("model_max_length") if settings.is_file() else None
    return int(length) if length and length < 10_000_000 else None  # transformers writes 1e30 for "unknown"
