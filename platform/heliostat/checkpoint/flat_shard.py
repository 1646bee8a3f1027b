"""Represents a rank's slice of a parameter as a tensor that stock torch.distributed.checkpoint (DCP) can save and reshard."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatShard(torch.Tensor):
    """Represents the slice [start, start + n) that `local` holds of a flat tensor of `numel` elements.

    Supports only DCP's protocol.
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
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"a FlatShard has no {func}")

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=torch.Size([self.local.numel()]))

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        if not self.local.numel():
            return []
        data = TensorWriteData(self._chunk(), TensorProperties(dtype=self.dtype), torch.Size([self.shape[0]]))
        return [WriteItem(MetadataIndex(name, torch.Size([self.start])), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.local
