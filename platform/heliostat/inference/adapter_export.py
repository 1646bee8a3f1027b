"""Exports the adapter of a run (`recipes.adapters`): in the format of peft or diffusers, or merged into its base.

After an export, `require_same` loads the exported files with only peft, transformers, and diffusers, and compares the outputs
for a small batch with those of the trained model. This needs memory for one complete model in fp32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.errors import CheckpointError, ConfigError
from heliostat.inference.post_hoc import PostHocAverage
from heliostat.recipes import adapters, building, folder_digests, folder_weights, weightless
from heliostat.recipes.adapters import Adapts
from heliostat.recipes.exported import ADAPTER as RECORD
from heliostat.recipes.protocol import Recipe
from heliostat.storage.hub import files
from heliostat.terminal import console

log = logging.getLogger(__name__)

BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of differences, relative to the largest output


class Agreement(NamedTuple):
    """Describes how an export differs from the trained model, in units of the largest output. `difference`: between the exported
    and the trained model; `effect`: between the trained model and its base."""

    difference: float
    effect: float


class BaseWeights(Mapping[str, torch.Tensor]):
    """Provides the parameters of a model's base by name. Reads one parameter at a time from the base's folder if possible."""

    def __init__(self, recipe: Recipe) -> None:
        with weightless.building() as noted:
            model = building.build(recipe)
        named = {name: p for name, p in model.named_parameters() if adapters.is_base(p)}
        try:
            stored = folder_weights.find(model, noted)
            self._read = {name: stored[id(p)].read for name, p in named.items()}
        except folder_weights.UnreadableError as e:
            log.warning("the export loads the complete base, because heliostat can't read its tensors one by one (%s)", e)
            built = dict(building.build(recipe).named_parameters())
            self._read = {name: built[name].detach for name in named}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def trains_adapter(recipe: Recipe) -> bool:
    return isinstance(recipe, Adapts) and recipe.adapter is not None


def require(checkpoint: SavedCheckpoint, recipe: Recipe) -> Adapts:
    """Returns the recipe of a run that trains an adapter. Raises ConfigError if the run trains no adapter, or if the base differs
    from the base that the run trained on. Raises CheckpointError if the adapter is zero."""
    if not isinstance(recipe, Adapts) or recipe.adapter is None:
        raise ConfigError(f"--adapter: {checkpoint.location}: the run has no adapter (model.adapter). Remove --adapter")
    base = recipe.base()
    if not folder_digests.matches(base, digest := folder_digests.weights_digest(base), checkpoint.index.base):
        raise ConfigError(
            f"{checkpoint.location}: the adapter was trained on another base than {files.shown(base)!r} (digest "
            f"{checkpoint.index.base}, found {digest}). Restore the base's folder"
        )
    kind = next(iter(checkpoint.averages), "master")
    ups = [name for name in checkpoint.names(kind) if name.endswith(adapters.UP)]
    if not any(bool(piece.any()) for name in ups for piece in checkpoint.stream(f"{kind}.{name}")):
        raise CheckpointError(
            f"{checkpoint.location}: the adapter is empty or zero, so it changes nothing. Use a later checkpoint"
        )
    return recipe


def write_record(folder: Path, checkpoint: SavedCheckpoint, recipe: Adapts, origin: Mapping[str, object]) -> None:
    """Writes the adapter's `origin` (such as the run and step), its base with the digest, and the job. `base_format`: nf4 if the
    run stored its base in 4 bits; else None."""
    assert recipe.adapter
    base = {"base": files.shown(recipe.base()), "base_digest": checkpoint.index.base, "base_format": recipe.adapter.base}
    (folder / RECORD).write_text(json.dumps({**base, **origin, "job": checkpoint.index.job}, indent=1))


def require_same(
    checkpoint: SavedCheckpoint,
    recipe: Adapts,
    folder: Path,
    adapter: bool,
    dtype: torch.dtype,
    average: PostHocAverage | None = None,
) -> Agreement:
    """Compares an export with the trained model, and prints the difference. `dtype`: of the exported weights. `average`: the
    average of the adapter that was exported, instead of the average in the checkpoint. Raises CheckpointError if the outputs
    differ by more than rounding to this type explains."""
    model = building.build(recipe.plainly())
    kind = next(iter(checkpoint.averages), "master")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            values = average.read(name) if average else checkpoint.read(f"{kind}.{name}")
            p.copy_(values.to(dtype).view(p.shape))
        for name in checkpoint.names("buffer"):
            building.put_buffer(model, name, checkpoint.read(f"buffer.{name}").view(model.get_buffer(name).shape))
        right = recipe.answer(model.eval())
        with adapters.switched_off(model):
            plain = recipe.answer(model)
        del model, trained
        exported = recipe.answer(recipe.reload(folder, adapter).eval())
    largest = float(right.abs().max()) or 1.0
    agreement = Agreement(float((exported - right).abs().max()) / largest, float((plain - right).abs().max()) / largest)
    limit = BOUNDS[dtype] * (1 + agreement.effect)  # large adapters have large rounding errors
    if not agreement.difference <= limit:
        raise CheckpointError(
            f"{folder}: not exported, because the outputs of the files differ from the trained model's by "
            f"{agreement.difference:.1e} of the largest output (limit {limit:.0e}). Report this as a bug of heliostat"
        )
    console.print(
        f"the exported outputs differ from base + adapter by {agreement.difference:.1e} of the largest output. "
        f"The adapter changes the outputs by {agreement.effect:.1e}"
    )
    if agreement.difference > agreement.effect / 2:
        log.warning("rounding to %s hides most of the adapter's effect. Export with --adapter, or train in fp32", dtype)
    return agreement
