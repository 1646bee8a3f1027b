"""Compares the shard that a rank has just written with the rank's tensors, before `checkpoint.json` makes the folder valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from heliostat.checkpoint import layout
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.index import CheckpointIndex, TensorIndex
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.checkpoint.placement import WrittenPart
from heliostat.errors import CheckpointError
from heliostat.storage.locations import Location


def compare(target: Location, part: WrittenPart, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, bool]]:
    """Reads a rank's shard back from storage. Returns the name of each tensor, and whether it has a value other than zero in this
    shard. Raises CheckpointError if a stored tensor differs from the rank's tensor."""
    if not tensors:
        return []
    index = TensorIndex(layout.format_of(part.tensors), part.shards, part.tensors)
    saved, seen = SavedCheckpoint(target, cast("CheckpointIndex", index)), list[tuple[str, bool]]()
    for name, tensor in tensors.items():
        local = (tensor.local if isinstance(tensor, FlatShard) else tensor).reshape(-1)
        read = torch.empty_like(local, device="cpu")
        saved.fill(saved.slices(name, getattr(tensor, "start", 0), read))
        if not torch.equal(read.view(torch.uint8), local.view(torch.uint8)):
            raise CheckpointError(f"{target}: {name!r} differs from the tensor that was saved. Check the storage, and save again")
        seen.append((name, bool(read.any())))
    return seen


def require(target: Location, promised: Mapping[str, bool], seen: list[tuple[str, bool]]) -> None:
    """Raises CheckpointError if a promised tensor is missing, or is all zero although it can't be. `promised`: whether each
    tensor can be all zero. `seen`: the results of `compare` on all ranks."""
    present, filled = {name for name, _ in seen}, {name for name, other in seen if other}
    if lost := sorted(name for name, can_be_zero in promised.items() if name not in (present if can_be_zero else filled)):
        raise CheckpointError(
            f"{target}: can't save {lost[0]!r}: all its values are zero or missing ({len(lost)} tensors), which training can't "
            "cause. Report this as a bug of heliostat"
        )
