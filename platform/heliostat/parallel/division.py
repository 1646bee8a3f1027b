"""Describes which part of a parameter a worker has, if the workers of a group split the parameter.

The engine records the part on each parameter that is split. At ZeRO-3, the engine also records the shape, which DeepSpeed
removes. In every parallelism configuration, a worker's part is one slice of the flattened parameter, in the order of the
division's `columns`. So checkpoints load in any other configuration.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from heliostat.checkpoint.columns import ROWS, Columns
from heliostat.checkpoint.flat_shard import FlatShard


class Division(NamedTuple):
    """Describes this worker's part of a parameter: part number `part` of `parts` equal parts. Worker i of the group has part i.

    `width`: the number of columns, if a matrix is split by columns; 0 if a parameter is split in its first dimension.
    """

    part: int
    parts: int
    group: dist.ProcessGroup | None = None
    width: int = 0

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Copies this worker's part of a parameter. Returns the tensor itself if the parameter isn't split."""
        return whole.chunk(self.parts, 1 if self.width else 0)[self.part].clone() if self.parts > 1 else whole

    @property
    def columns(self) -> Columns:
        return Columns(self.parts, self.width) if self.width else ROWS


WHOLE = Division(0, 1)


def of(parameter: torch.Tensor) -> Division:
    """Returns this worker's part of a parameter."""
    return getattr(parameter, "division", WHOLE)


def note(parameter: torch.Tensor, shape: tuple[int, ...], division: Division = WHOLE) -> None:
    """Records on a parameter its complete shape, and this worker's part of the parameter."""
    noted: Any = parameter
    noted.division, noted.whole_shape = division, shape


def shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape of the complete parameter."""
    return tuple(getattr(parameter, "whole_shape", parameter.shape))


def numel(parameter: torch.Tensor) -> int:
    """Counts the elements of this worker's part of a parameter, before ZeRO shards it."""
    return math.prod(shape(parameter)) // of(parameter).parts


def placed(parameter: torch.Tensor, local: torch.Tensor, start: int) -> FlatShard:
    """Describes `local` as a slice of the complete parameter. The slice begins at element `start` of this worker's part."""
    mine, own = of(parameter), numel(parameter)
    return FlatShard(local, mine.part * own + start, mine.parts * own, mine.columns)


def assembled(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Joins the parts of a parameter from all workers of a group, in the parameter's shape. Returns `values` unchanged if the
    parameter isn't split. Collective."""
    mine = of(parameter)
    if mine.parts == 1:
        return values
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(mine.parts)]
    dist.all_gather(parts, values.contiguous(), group=mine.group)
    return torch.cat(parts, dim=1 if mine.width else 0)
