"""Evaluates an exported model on a dataset's held-out split, in this process, with the same metrics as training."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path

import numpy as np
import torch

from heliostat.config import spec, workspace
from heliostat.config.spec import Job
from heliostat.data import collection, content
from heliostat.data.dataset import open_dataset, plan
from heliostat.data.manifest import read
from heliostat.errors import ConfigError
from heliostat.evaluation import pictures
from heliostat.recipes import exported as exports
from heliostat.recipes.batches import taken
from heliostat.recipes.protocol import GUIDE, Evaluates, Exports, Recipe
from heliostat.schema import validate
from heliostat.storage.locations import Location
from heliostat.storage.records import Format

log = logging.getLogger(__name__)

BATCH = 8
SETTINGS = Format(dict[str, object], "tokenizer's configuration", ConfigError)


def evaluate(folder: Path, data: str, samples: int, sequence_length: int | None, fraction: float | None) -> dict[str, float]:
    """Computes the recipe's metrics over at most `samples` held-out samples.

    If `sequence_length` and `fraction` are None, uses the values of the training. The samples are then the same samples that
    training uses for its evaluations.
    """
    with exports.using(folder):
        return _evaluate(exports.read(folder), data, samples, sequence_length, fraction)


def _evaluate(
    export: exports.Export, data: str, samples: int, sequence_length: int | None, fraction: float | None
) -> dict[str, float]:
    job = collection.expand(_job(export, data, samples, sequence_length, fraction))
    manifests = [read(location) for location in job.sources]
    recipe: Recipe = export.recipe(job)
    if not isinstance(recipe, Evaluates) or not isinstance(recipe, Exports):
        raise ConfigError(
            f"{export.folder}: can't evaluate this model: {job.recipe} doesn't derive from Evaluates and Exports ({GUIDE})"
        )
    if manifests[0].kind != recipe.kind:
        raise ConfigError(
            f"--dataset: {data} contains {manifests[0].kind!r}, but the model needs {recipe.kind!r}. Pass another dataset"
        )
    recipe.bind(manifests)
    planned = plan(job, manifests)
    dataset = open_dataset(dataclasses.replace(planned, version=export.data_version) if export.data_version else planned)
    held_out = dataset.order.held_out(samples)
    if not len(held_out):
        raise ConfigError(f"--fraction: {planned.held_fraction:g} of {data} holds out no sample. Pass a larger fraction")
    if len(held_out) < min(samples, sum(dataset.order.held_shares(samples))):
        log.warning(
            "--samples: %d samples were asked for, but --fraction %g holds out only %d, so heliostat scores fewer",
            samples,
            planned.held_fraction,
            len(held_out),
        )
    contents = dataset.read(held_out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = recipe.load(export.folder).eval().to(device)
    sums: dict[str, float] = {}
    kept: list[dict[str, np.ndarray]] = []
    with torch.no_grad():
        for rows in _batches(held_out.source):
            part = content.part(contents, rows)
            whole = recipe.held_out_batch(part, np.arange(rows.start, rows.stop))
            batch = {k: v.to(device) for k, v in whole.items()}
            scores = recipe.evaluate(model, batch)
            kept.append(taken(scores, recipe.gathered, np.ones(rows.stop - rows.start, dtype=bool)))
            for name in scores.keys() - kept[-1].keys():
                sums[name] = sums.get(name, 0.0) + float(scores[name].double().sum())
    arrays = {name: np.concatenate([part[name] for part in kept]) for name in recipe.gathered}
    metrics = recipe.metrics(sums) | (recipe.measure(arrays) if arrays else {})
    return metrics | pictures.scores(recipe, model, dataset, device)


def _batches(source: np.ndarray) -> list[slice]:
    """Divides the samples into slices of at most BATCH samples, each from one source."""
    edges = [0, *(np.flatnonzero(np.diff(source)) + 1).tolist(), len(source)]
    return [slice(i, min(i + BATCH, b)) for a, b in itertools.pairwise(edges) for i in range(a, b, BATCH)]


def _job(export: exports.Export, data: str, samples: int, sequence_length: int | None, fraction: float | None) -> Job:
    """Returns the job that trained the model, but with this dataset instead of the job's own. For a language model without a
    record, returns a minimal job."""
    before: exports.TrainedFacts = export.job or {"name": "", "model": {}, "data": {}, "train": {}}
    length = sequence_length or before["data"].get("sequence_length")
    if export.job is None and not (length := length or _trained_length(export.folder)):
        raise ConfigError("--sequence-length: required, because the model doesn't record the length of its samples")
    held_out = fraction or (before.get("evaluate") or {}).get("fraction", 0.01)
    source, trained = {"path": str(Location(data).absolute(workspace.root()))}, before["train"]
    train = {
        "steps": 1,
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH,
        "optimizer": {"lr": 1.0},
        "seed": trained.get("seed", 0),
    }
    train["recipe_version"] = trained.get("recipe_version") or spec.BEFORE_KEYS["recipe_version"]
    train["precision"] = "bf16" if trained.get("precision") == "bf16" else "fp32"
    return validate(
        Job,
        {
            "name": "evaluate",
            "recipe": before.get("recipe", exports.LANGUAGE_MODEL),
            "model": export.recipe.exported(export.folder, before["model"]),
            "data": {"sources": [source], "sequence_length": length, "document_mask": before["data"].get("document_mask", False)},
            "train": train,
            "evaluate": {"every": 1, "samples": samples, "fraction": held_out},
            "checkpoint": {"every": 1},
            "storage": str(export.folder),
            "mlflow": {"uri": "sqlite:////dev/null", "experiment": "none"},
        },
        f"the job that made {export.folder}",
    )


def _trained_length(folder: Path) -> int | None:
    """Returns the sequence length of training, from the export's tokenizer settings. Returns None if these settings don't record
    the length."""
    settings = folder / "tokenizer_config.json"
    length = SETTINGS.read(settings).get("model_max_length") if settings.is_file() else None
    return (
        int(length) if isinstance(length, int | float) and 0 < length < 10_000_000 else None
    )  # transformers writes 1e30 if the length is unknown
