"""Aligns a backbone's hidden states with the features of a frozen image model (REPA: Yu et al. 2024, arXiv 2410.06940).

The loss adds `weight` times the mean, over patches, of minus the cosine similarity between the projected hidden states and the
features. A small network (the projector) maps hidden states to features. It trains with the model, and exports leave it out. The
features come from the dataset (`stored_features`), so training needs no image model.

If the backbone's tokens and the features have different grids, the hidden states are averaged by area onto the features' grid.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from heliostat.recipes import partitioning
from heliostat.recipes.constants import Constant
from heliostat.recipes.images import blocks
from heliostat.recipes.images.blocks import BlockOutput
from heliostat.recipes.protocol import Part
from heliostat.schema import Float, Strict


class Repa(Strict):
    layer: int = Field(gt=0)
    """Block whose output is aligned, counted from 1. The paper uses block 8 of 28."""
    weight: Float = Field(default=0.5, gt=0)
    """Weight of the alignment in the loss."""
    width: int = Field(default=2048, gt=0)
    """Width of the projector's hidden layers."""
    until_step: int | None = Field(default=None, gt=0)
    """Last step whose loss contains the alignment. Unset: all steps."""


@lru_cache(maxsize=64)
def averaging(source: int, target: int) -> Constant:
    """Computes the matrix that averages `source` equal intervals by length onto `target` equal intervals, fp32 [target,
    source]."""
    edges = torch.arange(source + 1, dtype=torch.float64) / source
    ends = torch.arange(target + 1, dtype=torch.float64) / target
    upper = torch.minimum(edges[None, 1:], ends[1:, None])
    lower = torch.maximum(edges[None, :-1], ends[:-1, None])
    return Constant(((upper - lower).clamp(min=0) * target).float())


def on_grid(hidden: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Averages a map [n, height, width, channels] by area onto a grid of another size."""
    if hidden.shape[1:3] == grid:
        return hidden
    rows, columns = (averaging(hidden.shape[i + 1], grid[i]).on(hidden.device).to(hidden.dtype) for i in (0, 1))
    return torch.einsum("gh,nhwc,kw->ngkc", rows, hidden, columns)


class Projector(nn.Module):
    """Projects hidden states to features: three linear layers with SiLU between them, as in the paper."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
        )

    def forward(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Computes the mean cosine similarity over the patches of each sample, fp32 [n]. `hidden`: [n, height, width, inputs].
        `features`: [n, rows, columns, outputs]."""
        projected = self.layers(on_grid(hidden, (features.shape[1], features.shape[2])))
        return functional.cosine_similarity(projected.float(), features.float(), dim=-1).flatten(1).mean(1)


def projector(repa: Repa, backbone: Any, outputs: int) -> tuple[Projector, BlockOutput]:
    """Builds the projector, and reads the block `repa.layer`. Raises ConfigError if the backbone has no such block."""
    aligned = blocks.block("model.repa.layer", backbone, repa.layer)
    with partitioning.constructing():
        built = Projector(blocks.width(backbone, aligned), repa.width, outputs)
    return built, BlockOutput(backbone, aligned)


def part(repa: Repa, similarity: torch.Tensor, keys: torch.Tensor, batch: int) -> Part:
    """Returns the alignment's part of the loss. After `until_step`, the part is logged, but has no gradient.

    `similarity`: of each sample, fp32 [n]. `keys`: the samples' positions in the sequence of all global batches, int64 [n].
    `batch`: the number of samples of a step.
    """
    value = -similarity
    if repa.until_step:
        value = torch.where(keys < repa.until_step * batch, value, value.detach())
    return Part(value.mean(), repa.weight)
