"""Represents a rank's slice of a parameter as a tensor that says which elements of the whole it holds."""

from __future__ import annotations

from typing import Any

import torch


class FlatShard(torch.Tensor):
    """Represents the slice [start, start + n) that `local` holds of a flat tensor of `numel` elements.

    It has the whole's shape, and computes nothing.
    """

    local: torch.Tensor
    start: int

    @staticmethod
    def __new__(cls, local: torch.Tensor, start: int, numel: int) -> FlatShard:
        shard = torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=local.dtype, device=local.device)
        shard.local, shard.start = local, start
        return shard

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"a FlatShard has no {func}")
