"""Lets recipes build models that the engine partitions among workers during construction (ZeRO stage 3).

Recipes can't import the engine. Instead, the engine sets a `Partitioner` here while the engine builds a model. Recipes call the
functions of this module. If no `Partitioner` is set, for example at stages 0 to 2 or on the driver, models are built as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol

import torch

from heliostat.parallel import division
from heliostat.recipes import partitioning


class Partitioner(Protocol):
    """Partitions a model's parameters while the model is built."""

    def constructing(self) -> AbstractContextManager[object]:
        """Opens a context in which constructors keep only this worker's part of each parameter."""

    def whole(self, parameter: torch.Tensor) -> AbstractContextManager[object]:
        """Opens a context in which a parameter is complete. When the context ends, all workers get the first worker's values.
        Collective."""

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """Returns the shape of the complete parameter. This worker may have only a part of the parameter."""


_partitioner: ContextVar[Partitioner | None] = ContextVar("partitioner", default=None)


@contextmanager
def by(partitioner: Partitioner) -> Iterator[None]:
    """Partitions the models that are built inside the context."""
    token = _partitioner.set(partitioner)
    try:
        yield
    finally:
        _partitioner.reset(token)


def wanted() -> bool:
    """Returns whether the engine is building a model with partitioned parameters now."""
    return _partitioner.get() is not None


def constructing() -> AbstractContextManager[object]:
    """Opens a context for the constructor of a model whose library doesn't support ZeRO."""
    partitioner = _partitioner.get()
    return partitioner.constructing() if partitioner else nullcontext()


def whole(parameter: torch.Tensor) -> AbstractContextManager[object]:
    """Opens a context in which a parameter is complete, so that you can set its values."""
    partitioner = _partitioner.get()
    return partitioner.whole(parameter) if partitioner else nullcontext()


def shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape of the complete parameter. This worker may have only a part of the parameter."""
    partitioner = _partitioner.get()
    return partitioner.shape(parameter) if partitioner else division.shape(parameter)


@torch.no_grad()
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a value into a parameter, even if ZeRO-3 has partitioned the parameter."""
    with partitioning.whole(parameter):
        parameter.copy_(value)
