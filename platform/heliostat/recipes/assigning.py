"""Sets the weights of a model that was just built, also where ZeRO-3 has partitioned it."""

from __future__ import annotations

import torch

from heliostat.recipes import partitioning


@torch.no_grad()
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a value into a parameter, also into one that ZeRO-3 has partitioned."""
    with partitioning.whole(parameter):
        parameter.copy_(value)
