"""Defines a recipe that flips a bit of a weight in its second worker about step 13, once per run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from heliostat.recipes.protocol import Batch, Loss
from heliostat.recipes.text.causal_lm import CausalLM

FLIPPING = {"recipe": "tests.integration.flipping:Flipping"}
# Batches are made one step ahead. So at each loss of step 13, the newest batch is of step 13 or 14.
NEWEST = (13, 14)


class Flipping(CausalLM):
    step = -1

    def batch(self, content: np.ndarray, keys: Any = None) -> Batch:
        if keys is not None:
            self.step = int(keys[0]) // self.job.train.global_batch_size
        return super().batch(content, keys)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        mark = Path(self.job.storage, "flipped")
        if self.step in NEWEST and dist.get_rank() == 1 and not mark.exists():
            mark.touch()
            next(model.parameters()).data.view(-1).view(torch.int32)[7] ^= 1
        return super().loss(model, batch)
