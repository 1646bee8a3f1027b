"""A Hugging Face folder from a checkpoint: no GPU, no process group, one tensor in memory at a time.

The weights are the fp32 masters, rounded to the precision that the run computed in: just what its evaluation used.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from heliostat.data.dataset import DataPlan, open_dataset
from heliostat.errors import CheckpointError
from heliostat.recipe import Recipe
from heliostat.spec import Job
from heliostat.train.checkpoint import Checkpoint

SHARD_BYTES = 4 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def recipe_of(checkpoint: Checkpoint) -> tuple[Job, Recipe]:
    """The job and the bound recipe that made a checkpoint, from its own record."""
    from heliostat.train.loop import make_recipe

    job = Job.model_validate(checkpoint.index["job"])
    return job, make_recipe(job, open_dataset(DataPlan.parse(checkpoint.index["data"])))


def export(checkpoint: Checkpoint, folder: Path) -> Recipe:
    """Writes the model at `folder`, which `from_pretrained` then loads; returns the recipe."""
    job, recipe = recipe_of(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = recipe.build()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    missing = sorted(set(shapes) - set(checkpoint.names("master")))
    if missing:
        raise CheckpointError(f"{checkpoint.location}: has no weights for {missing[0]!r}; it was made by another model")

    dtype = DTYPES[job.train.precision]
    buffers = {n: f"buffer.{n}" for n in checkpoint.names("buffer")}
    names = {n: f"master.{n}" for n in shapes} | buffers
    sizes = {n: shapes[n].numel() * dtype.itemsize if n in shapes else 0 for n in names}
    files = _pack(sizes)
    weight_map = {}
    for number, part in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for name in part:
            flat = checkpoint.read(names[name])
            tensors[name] = flat.view(shapes[name]).to(dtype) if name in shapes else flat
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    recipe.save_config(folder)
    return recipe


def _pack(sizes: dict[str, int]) -> list[list[str]]:
    """Names in order, cut into files of at most SHARD_BYTES (or one tensor)."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if files[-1] and used + size > SHARD_BYTES:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files
