"""Builds a recipe with only the required methods, and rows for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from heliostat.recipes.protocol import IGNORED, Batch, Loss, Recipe
from torch import nn


class Least(Recipe):
    """Implements only the required methods of a recipe."""

    kind = "rows"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 2))

    def batch(self, content: Any, keys: np.ndarray) -> Batch:
        return {"x": torch.tensor(content["x"].to_pylist()), "labels": torch.tensor(content["label"].to_pylist())}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(nn.functional.cross_entropy(model(batch["x"]), batch["labels"], ignore_index=IGNORED, reduction="sum"))


ROWS = pa.table({"x": [[0.1, 0.2, 0.3, 0.4]] * 4, "label": [0, 1, IGNORED, 1]})
KEYS = np.arange(4)
