"""A Hugging Face folder from a checkpoint: no GPU, no process group, and some pieces of 64 MiB in memory, never the model.

The weights are the fp32 masters, rounded to the precision that the run computed in: just what its evaluation used. A model of
more than 4 GiB becomes several files with an index, as transformers writes it. What is damaged is never exported.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from heliostat.checkpoint import safetensors_file
from heliostat.checkpoint.checksums import as_bytes, cut
from heliostat.checkpoint.layout import EMA, FROZEN, Checkpoint
from heliostat.config.spec import Job
from heliostat.data.dataset import open_dataset
from heliostat.errors import CheckpointError, ConfigError, naming
from heliostat.recipes import exported
from heliostat.recipes.loading import load
from heliostat.recipes.protocol import Recipe

log = logging.getLogger(__name__)

SHARD_BYTES = 4 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def recipe_of(checkpoint: Checkpoint) -> tuple[Job, Recipe]:
    """The job and the bound recipe that made a checkpoint, from its own record."""

    job, place = checkpoint.job, checkpoint.location
    with naming(place):
        return job, load(job, open_dataset(checkpoint.plan).sources, None if place.is_s3 else Path(place.path).parents[1])


def export(checkpoint: Checkpoint, folder: Path, run_id: str | None = None) -> Recipe:
    """Writes the model at `folder`, which `from_pretrained` then loads; returns the recipe. `run_id`: of its MLflow run."""
    job, recipe = recipe_of(checkpoint)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty, and its files would be mixed with the model's; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = recipe.build()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    initial = _initial(checkpoint, job, recipe, [n for n, p in model.named_parameters() if not p.requires_grad])
    for prefix, file in recipe.layout.items():
        mine = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        if mine:
            write_weights(checkpoint, mine, DTYPES[job.train.precision], folder / file, prefix, initial)
    recipe.save_config(folder)
    origin = {"run_id": run_id, "step": checkpoint.step, "data_digest": checkpoint.index["data_digest"]}
    exported.write(folder, job, {**origin, "data_version": checkpoint.plan.version})
    return recipe


def _initial(checkpoint: Checkpoint, job: Job, recipe: Recipe, frozen: list[str]) -> dict[str, torch.Tensor]:
    """What is not trained and the checkpoint does not hold, which older ones do not: it is what the model was built with."""
    held = {*checkpoint.names("master"), *checkpoint.names(FROZEN)}
    if not (wanted := [n for n in frozen if n not in held]):
        return {}
    log.warning("%s: holds no parameters that are not trained; %d are built anew from the seed", checkpoint.location, len(wanted))
    torch.manual_seed(job.train.seed)
    built = dict(recipe.build().named_parameters())
    return {n: built[n].detach() for n in wanted}


def write_weights(
    checkpoint: Checkpoint,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    stem: Path,
    prefix: str = "",
    initial: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """The parameters of these names and shapes, and the checkpoint's buffers below the prefix, without it, as STEM.safetensors.

    Where the run averaged its weights, the average is taken; what was not trained is taken as it is, or `initial`.
    """
    weights = EMA if checkpoint.names(EMA) else "master"
    trained, frozen = set(checkpoint.names(weights)), set(checkpoint.names(FROZEN))
    missing = sorted(set(shapes) - trained - frozen - set(initial))
    if missing:
        raise CheckpointError(f"{checkpoint.location}: has no weights for {missing[0]!r}; it was made by another model")
    cut_ = len(prefix)
    sources = {n: f"{weights if n in trained else FROZEN}.{n}" for n in shapes}
    streams = {
        n: partial(checkpoint.stream, s) if n in trained | frozen else partial(_pieces, initial[n]) for n, s in sources.items()
    }
    entries = {n: _entry(n[cut_:], streams[n], shape, dtype) for n, shape in shapes.items()}
    for name in (n for n in checkpoint.names("buffer") if n.startswith(prefix)):
        held = checkpoint.index["tensors"][f"buffer.{name}"]
        kind = safetensors_file.DTYPES[held["dtype"]]
        entries[name] = _entry(name[cut_:], partial(checkpoint.stream, f"buffer.{name}"), tuple(held["shape"]), kind)
    entries = {entry.name: entry for entry in entries.values()}
    files = _pack({name: entry.size for name, entry in entries.items()})
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = f"{stem.name}{'' if len(files) == 1 else f'-{number:05d}-of-{len(files):05d}'}.safetensors"
        safetensors_file.write(stem.with_name(file), [entries[name] for name in part], {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(entry.size for entry in entries.values())}, "weight_map": weight_map}
        stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield tensor.reshape(-1)


def _entry(
    name: str, stream: Callable[[], Iterator[torch.Tensor]], shape: tuple[int, ...], dtype: torch.dtype
) -> safetensors_file.Entry:
    """A tensor of the model, read piece by piece when its turn comes."""

    def parts() -> Iterator[memoryview]:
        for piece in stream():
            yield from cut(as_bytes(piece.to(dtype)))

    return safetensors_file.Entry(name, dtype, shape, parts)


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
