"""Walks through a tensor and its neighbours piece by piece, so that a step's temporary tensors are small."""

from __future__ import annotations

from collections.abc import Iterator

import torch

PIECE = 1 << 24  # elements: ZeRO steps a worker's whole share as one tensor


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields views of the same elements of every tensor."""
    return zip(*(t.view(-1).split(PIECE) for t in tensors), strict=True)
