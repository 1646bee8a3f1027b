"""Represents a rank's slice of a parameter as a tensor that records which elements of the complete parameter this slice holds."""

from __future__ import annotations

import torch

from heliostat.checkpoint.columns import ROWS, Columns


class FlatShard(torch.Tensor):
    """Represents the slice [start, start + n) of a flat tensor of `numel` elements, in the order of `columns`.

    `local` holds the slice. The shape of this object is the shape of the complete flat tensor. Operations on a FlatShard aren't
    supported.
    """

    local: torch.Tensor
    start: int
    columns: Columns

    @staticmethod
    def __new__(cls, local: torch.Tensor, start: int, numel: int, columns: Columns = ROWS) -> FlatShard:
        shard = torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=local.dtype, device=local.device)
        shard.local, shard.start, shard.columns = local, start, columns
        return shard

    def holding(self, local: torch.Tensor) -> FlatShard:
        """Returns a shard of the same elements, with the values in `local`."""
        return FlatShard(local, self.start, self.shape[0], self.columns)

    def cut(self, first: int, stop: int) -> FlatShard:
        """Returns the part [first, stop) of this slice."""
        return FlatShard(self.local[first:stop], self.start + first, self.shape[0], self.columns)

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> object:  # type: ignore[override]
        raise TypeError(f"a FlatShard doesn't support {func}. Use the tensor in `local`")
