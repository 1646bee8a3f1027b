"""Builds a recipe around any model, for tests with their own model. Its forward pass takes `x` and `y`, and returns a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from heliostat.recipes.protocol import Batch, Loss, Recipe
from torch import nn


class Around(Recipe):
    """Defines a recipe that builds its model under zero.Init at stage 3, like large models."""

    kind = "rows"

    def __init__(self, model: Callable[[], nn.Module]) -> None:
        self.model = model

    def build(self) -> nn.Module:
        from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

        if not is_deepspeed_zero3_enabled():
            return self.model()
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=deepspeed_config()):
            return self.model()

    def batch(self, content: Any, keys: np.ndarray) -> Batch:
        return {name: torch.tensor(content[name].to_pylist()) for name in ("x", "y")}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(model(**batch) * len(batch["x"]))
