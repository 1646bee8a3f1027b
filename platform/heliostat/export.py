"""A Hugging Face folder from a checkpoint: no GPU, no process group, and some pieces of 64 MiB in memory, never the model.

The weights are the fp32 masters, rounded to the precision that the run computed in: just what its evaluation used. A model of
more than 4 GiB becomes several files with an index, as transformers writes it. What is damaged is never exported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from heliostat.data.dataset import DataPlan, open_dataset
from heliostat.errors import CheckpointError
from heliostat.recipe import Recipe
from heliostat.spec import Job
from heliostat.train import tensorfile
from heliostat.train.blocks import as_bytes, cut
from heliostat.train.stored import Checkpoint

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
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    write_weights(checkpoint, shapes, DTYPES[job.train.precision], folder)
    recipe.save_config(folder)
    return recipe


def write_weights(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, folder: Path) -> None:
    """The parameters of these names and shapes, and the checkpoint's buffers, as safetensors in the folder."""
    missing = sorted(set(shapes) - set(checkpoint.names("master")))
    if missing:
        raise CheckpointError(f"{checkpoint.location}: has no weights for {missing[0]!r}; it was made by another model")
    entries = {name: _entry(checkpoint, name, f"master.{name}", shape, dtype) for name, shape in shapes.items()}
    for name in checkpoint.names("buffer"):
        held = checkpoint.index["tensors"][f"buffer.{name}"]
        entries[name] = _entry(checkpoint, name, f"buffer.{name}", tuple(held["shape"]), tensorfile.DTYPES[held["dtype"]])
    files = _pack({name: entry.size for name, entry in entries.items()})
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensorfile.write(folder / file, [entries[name] for name in part], {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(entry.size for entry in entries.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _entry(checkpoint: Checkpoint, name: str, source: str, shape: tuple[int, ...], dtype: torch.dtype) -> tensorfile.Entry:
    """A tensor of the model, read from the checkpoint piece by piece when its turn comes."""

    def parts() -> Iterator[memoryview]:
        for piece in checkpoint.stream(source):
            yield from cut(as_bytes(piece.to(dtype)))

    return tensorfile.Entry(name, dtype, shape, parts)


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
