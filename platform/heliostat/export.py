"""A Hugging Face folder from a checkpoint: no GPU, no process group, and some pieces of 64 MiB in memory, never the model.

The weights are the fp32 masters, rounded to the precision that the run computed in: just what its evaluation used. A model of
more than 4 GiB becomes several files with an index, as transformers writes it. What is damaged is never exported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from heliostat import exports
from heliostat.data.dataset import DataPlan, open_dataset
from heliostat.errors import CheckpointError
from heliostat.recipe import Recipe
from heliostat.spec import Job
from heliostat.train import tensorfile
from heliostat.train.blocks import as_bytes, cut
from heliostat.train.ema import KEY as EMA
from heliostat.train.stored import Checkpoint

SHARD_BYTES = 4 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def recipe_of(checkpoint: Checkpoint) -> tuple[Job, Recipe]:
    """The job and the bound recipe that made a checkpoint, from its own record."""
    from heliostat.train.loop import make_recipe

    job = Job.model_validate(checkpoint.index["job"])
    place = checkpoint.location
    dataset = open_dataset(DataPlan.parse(checkpoint.index["data"]))
    return job, make_recipe(job, dataset, None if place.is_s3 else Path(place.path).parents[1])


def export(checkpoint: Checkpoint, folder: Path, run_id: str | None = None) -> Recipe:
    """Writes the model at `folder`, which `from_pretrained` then loads; returns the recipe. `run_id`: of its MLflow run."""
    job, recipe = recipe_of(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = recipe.build()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for prefix, file in recipe.layout.items():
        mine = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        if mine:
            write_weights(checkpoint, mine, DTYPES[job.train.precision], folder / file, prefix)
    recipe.save_config(folder)
    origin = {"run_id": run_id, "step": checkpoint.step, "data_digest": checkpoint.index["data_digest"]}
    exports.write(folder, job, {**origin, "data_version": DataPlan.parse(checkpoint.index["data"]).version})
    return recipe


def write_weights(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, stem: Path, prefix: str = ""
) -> None:
    """The parameters of these names and shapes, and the checkpoint's buffers below the prefix, without it, as STEM.safetensors.

    Where the run averaged its weights, the average is taken.
    """
    weights = EMA if checkpoint.names(EMA) else "master"
    missing = sorted(set(shapes) - set(checkpoint.names(weights)))
    if missing:
        raise CheckpointError(f"{checkpoint.location}: has no weights for {missing[0]!r}; it was made by another model")
    cut_ = len(prefix)
    entries = {n: _entry(checkpoint, n[cut_:], f"{weights}.{n}", shape, dtype) for n, shape in shapes.items()}
    for name in (n for n in checkpoint.names("buffer") if n.startswith(prefix)):
        held = checkpoint.index["tensors"][f"buffer.{name}"]
        kind = tensorfile.DTYPES[held["dtype"]]
        entries[name] = _entry(checkpoint, name[cut_:], f"buffer.{name}", tuple(held["shape"]), kind)
    entries = {entry.name: entry for entry in entries.values()}
    files = _pack({name: entry.size for name, entry in entries.items()})
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = f"{stem.name}{'' if len(files) == 1 else f'-{number:05d}-of-{len(files):05d}'}.safetensors"
        tensorfile.write(stem.with_name(file), [entries[name] for name in part], {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(entry.size for entry in entries.values())}, "weight_map": weight_map}
        stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(index, indent=2))


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
