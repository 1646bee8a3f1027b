"""Assembles what ZeRO shards of a trained parameter, for comparisons of numbers: the gradient, the state, the weight in use.

All of it is collective. Where workers divide matrices or experts, what is assembled is this worker's part (`division`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def gradient(p: Any) -> torch.Tensor | None:
    """Assembles the gradient of the backward passes since the last step; None if the parameter has none."""
    from deepspeed.utils import safe_get_full_grad

    grad: torch.Tensor | None = safe_get_full_grad(p)
    return None if grad is None else grad.detach()


def state(engine: Any, p: Any, key: str | None) -> torch.Tensor:
    """Assembles the fp32 master weight, or the optimizer's state `key`."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not engine.zero_optimization_stage():
        found = p.data if key is None else engine.optimizer.state[p][key]
    else:
        found = safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)
    tensor: torch.Tensor = found.detach()
    return tensor


def gathered(engine: Any, p: Any) -> AbstractContextManager[Any]:
    """Opens the context in which a parameter holds the weight that the forward pass uses."""
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[Any] = GatheredParameters([p], enabled=engine.zero_optimization_stage() == 3)
    return context
