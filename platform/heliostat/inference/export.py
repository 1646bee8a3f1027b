"""Exports a checkpoint as a Hugging Face folder, without a GPU or a process group. Only a few pieces of 64 MiB are in memory at
a time, never the complete model.

The exported weights are the fp32 master weights, rounded to the precision of the run's computation. The run's evaluation used the
same weights. A model that is larger than 4 GiB becomes several files with an index, as in transformers. A damaged checkpoint is
never exported.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from heliostat.checkpoint import safetensors_file
from heliostat.checkpoint.checksums import as_bytes, cut
from heliostat.checkpoint.layout import FROZEN, SavedCheckpoint
from heliostat.config.spec import Job
from heliostat.data.dataset import open_dataset
from heliostat.errors import CheckpointError, ConfigError, naming
from heliostat.inference import adapter_export
from heliostat.inference.post_hoc import PostHocAverage
from heliostat.recipes import adapter_tensors, building, exported
from heliostat.recipes.loading import load
from heliostat.recipes.precision import dtype_of
from heliostat.recipes.protocol import GUIDE, Exports, Recipe, Weight
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)

SHARD_BYTES = 4 << 30


def recipe_of(checkpoint: SavedCheckpoint) -> tuple[Job, Recipe]:
    """Loads the job from the checkpoint's own record, with the recipe bound to the job's datasets."""

    job, place = checkpoint.job, checkpoint.location
    with naming(place):
        return job, load(job, open_dataset(checkpoint.plan).sources, None if place.is_s3 else Path(place.path).parents[1])


def export(
    checkpoint: SavedCheckpoint,
    folder: Path,
    run_id: str | None = None,
    adapter: bool = False,
    average: PostHocAverage | None = None,
) -> Recipe:
    """Writes the checkpoint's model to `folder`, in a form that `from_pretrained` can load; returns the recipe.

    If the run trained an adapter, merges the adapter into its base; with `adapter`, writes only the adapter. Removes the folder
    if its outputs differ from those of the trained model. `run_id`: id of the MLflow run, recorded in the folder. `average`: the
    average of the weights to write, instead of the average in the checkpoint. Raises ConfigError if the recipe doesn't support
    export or the folder isn't empty; raises CheckpointError if the checkpoint lacks a weight.
    """
    job, recipe = recipe_of(checkpoint)
    if not isinstance(recipe, Exports):
        raise ConfigError(
            f"{checkpoint.location}: {job.recipe} doesn't support export: it doesn't derive from {Exports.__name__} ({GUIDE})"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: not empty, and the model's files would mix with the other files. Pass another folder")
    Location(str(folder.absolute())).require_writable()
    adapted = adapter_export.require(checkpoint, recipe) if adapter or adapter_export.trains_adapter(recipe) else None
    lengths = {"ema_length": average.length, "ema_error": average.error} if average else {}
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = building.build(recipe)
    shapes, dtype = {name: tuple(p.shape) for name, p in model.named_parameters()}, dtype_of(job.train.precision)
    if adapted and adapter:
        metadata = adapted.save_adapter_config(folder, adapter_tensors.layers_of(shapes))
        for file, tensors in adapted.adapter_files(shapes).items():
            write_weights(checkpoint, shapes, dtype, folder / file, tensors, metadata=metadata, average=average)
        adapter_export.write_record(folder, checkpoint, adapted, {"run_id": run_id, "step": checkpoint.step, **lengths})
    else:
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        initial = adapter_export.BaseWeights(recipe) if adapted else _initial(checkpoint, job, recipe, frozen)
        for file, tensors in _files(recipe, shapes, checkpoint).items():
            write_weights(checkpoint, shapes, dtype, folder / file, tensors, initial, average=average)
        recipe.save_config(folder)
        origin = {"run_id": run_id, "step": checkpoint.step, "data_digest": checkpoint.index.data_digest, **lengths}
        exported.write(folder, job, {**origin, "data_version": checkpoint.plan.version})
    if adapted:
        try:
            adapter_export.require_same(checkpoint, adapted, folder, adapter, dtype, average)
        except BaseException:  # the libraries' own errors and Ctrl-C, too: no unchecked export stays
            shutil.rmtree(folder)
            raise
    return recipe


def _initial(checkpoint: SavedCheckpoint, job: Job, recipe: Recipe, frozen: list[str]) -> dict[str, torch.Tensor]:
    """Rebuilds the frozen parameters that an older checkpoint lacks, with their initial values from the job's seed."""
    saved = {*checkpoint.names("master"), *checkpoint.names(FROZEN)}
    if not (wanted := [n for n in frozen if n not in saved]):
        return {}
    log.warning(
        "%s: the checkpoint has no frozen parameters, so %d parameters get their initial values from the job's seed",
        checkpoint.location,
        len(wanted),
    )
    torch.manual_seed(job.train.seed)
    built = dict(building.build(recipe).named_parameters())
    return {n: built[n].detach() for n in wanted}


def _files(recipe: Exports, shapes: dict[str, tuple[int, ...]], checkpoint: SavedCheckpoint) -> dict[str, dict[str, Weight]]:
    """Maps each file to its tensors, as the recipe defines them. Logs a warning if parameters are in no file."""
    files = {file: tensors for file, tensors in recipe.tensors({**shapes, **_buffers(checkpoint)}).items() if tensors}
    used = {source for tensors in files.values() for weight in tensors.values() for source in weight.sources}
    if unused := [n for n in shapes if n not in used]:
        log.warning(
            "the export leaves out %d parameters, for example %s, because the recipe writes them to no file",
            len(unused),
            unused[0],
        )
    return files


def _buffers(checkpoint: SavedCheckpoint) -> dict[str, tuple[int, ...]]:
    return {n: tuple(checkpoint.index.tensors[f"buffer.{n}"].shape) for n in checkpoint.names("buffer")}


def write_weights(
    checkpoint: SavedCheckpoint,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    stem: Path,
    tensors: Mapping[str, Weight] | None = None,
    initial: Mapping[str, torch.Tensor] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({}),
    average: PostHocAverage | None = None,
) -> None:
    """Computes tensors from the model's parameters and the checkpoint's buffers, and writes them to STEM.safetensors.

    `shapes`: the shapes of the parameters. `tensors`: the tensors to write, by default all parameters and buffers. Parameters
    get the type `dtype`; buffers that are written unchanged keep their type. If the run averaged its weights, the checkpoint's
    first average is written, or `average`. Frozen parameters come from the checkpoint, or from `initial`. `metadata`: more
    entries of the files' headers.
    """
    known = {**shapes, **_buffers(checkpoint)}
    sources = _Sources(checkpoint, known, initial, average)
    if tensors is None:
        tensors = {name: Weight((name,), shape) for name, shape in known.items()}
    entries = {name: sources.entry(name, weight, dtype) for name, weight in tensors.items()}
    files = _pack({name: entry.size for name, entry in entries.items()})
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = f"{stem.name}{'' if len(files) == 1 else f'-{number:05d}-of-{len(files):05d}'}.safetensors"
        safetensors_file.write(stem.with_name(file), [entries[name] for name in part], {"format": "pt", **metadata})
        weight_map |= dict.fromkeys(part, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(entry.size for entry in entries.values())}, "weight_map": weight_map}
        stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(index, indent=2))


class _Sources:
    """Provides a model's tensors by name, from the checkpoint or from initial values."""

    def __init__(
        self,
        checkpoint: SavedCheckpoint,
        shapes: Mapping[str, tuple[int, ...]],
        initial: Mapping[str, torch.Tensor],
        average: PostHocAverage | None,
    ) -> None:
        weights = next(iter(checkpoint.averages), "master")
        self.averages = dict.fromkeys(checkpoint.names(weights), average) if average else {}
        kept = ("buffer", FROZEN, weights)  # if several kinds contain a name, the last kind counts
        self.places = {name: f"{kind}.{name}" for kind in kept for name in checkpoint.names(kind)}
        self.checkpoint, self.shapes, self.initial = checkpoint, shapes, initial

    def entry(self, name: str, weight: Weight, dtype: torch.dtype) -> safetensors_file.Entry:
        if missing := [s for s in weight.sources if s not in self.places and s not in self.initial]:
            raise CheckpointError(
                f"{self.checkpoint.location}: has no weights for {missing[0]!r}, so this checkpoint belongs to another model"
            )
        if weight.make is not None:
            return _entry(name, partial(self._made, name, weight), weight.shape, dtype)
        if len(weight.sources) != 1:
            raise ConfigError(
                f"recipe: the export's {name!r} combines {len(weight.sources)} tensors and has no `make`. Add `make` ({GUIDE})"
            )
        (source,) = weight.sources
        place = self.places.get(source, "")
        if place.startswith("buffer."):
            dtype = safetensors_file.DTYPES[self.checkpoint.index.tensors[place].dtype]
        return _entry(name, partial(self._pieces, source), weight.shape, dtype)

    def _pieces(self, source: str) -> Iterator[torch.Tensor]:
        if source in self.averages:
            yield from self.averages[source].stream(source)
        elif source in self.places:
            yield from self.checkpoint.stream(self.places[source])
        else:
            yield self.initial[source].reshape(-1)

    def _made(self, name: str, weight: Weight) -> Iterator[torch.Tensor]:
        """Computes a tensor with the weight's `make`. The source tensors are in fp32, and each has its own shape."""
        assert weight.make
        computed = weight.make(*(self._whole(s).float().view(self.shapes[s]) for s in weight.sources))
        if (shape := tuple(computed.shape)) != tuple(weight.shape):
            raise ConfigError(
                f"recipe: `make` of the export's {name!r} returns shape {shape}, expected {tuple(weight.shape)}. "
                "Correct one of them"
            )
        yield computed.reshape(-1)

    def _whole(self, source: str) -> torch.Tensor:
        if source in self.averages:
            return self.averages[source].read(source)
        return self.checkpoint.read(self.places[source]) if source in self.places else self.initial[source].reshape(-1)


def _entry(
    name: str, stream: Callable[[], Iterator[torch.Tensor]], shape: tuple[int, ...], dtype: torch.dtype
) -> safetensors_file.Entry:
    """Describes a tensor for the file writer, which reads the tensor piece by piece."""

    def parts() -> Iterator[memoryview]:
        for piece in stream():
            yield from cut(as_bytes(piece.to(dtype)))

    return safetensors_file.Entry(name, dtype, shape, parts)


def _pack(sizes: dict[str, int]) -> list[list[str]]:
    """Distributes names, in order, over files of at most SHARD_BYTES. A larger tensor gets its own file."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if files[-1] and used + size > SHARD_BYTES:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files
