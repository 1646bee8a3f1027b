"""Sets the weights of a model that was just built, also where ZeRO-3 has partitioned it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


@torch.no_grad()
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a value into a parameter, also into one that ZeRO-3 has partitioned."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        gathered: Any = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    else:
        gathered = nullcontext()
    with gathered:
        parameter.copy_(value)
