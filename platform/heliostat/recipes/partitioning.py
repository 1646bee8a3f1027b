"""Lets recipes build models that the engine partitions among workers during construction (ZeRO stage 3).

The engine is above this room. It sets a `Partitioner` while it builds a model, and recipes ask here for it. Without one, for
example below stage 3 or on the driver, models are built as usual.
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
        """Opens the context in which constructors keep only this worker's part of each parameter."""

    def whole(self, parameter: torch.Tensor) -> AbstractContextManager[object]:
        """Opens the context in which a parameter is complete. Afterwards, all workers have the first one's values; collective."""

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """Returns the shape of the parameter that this worker has a part of."""


_partitioner: ContextVar[Partitioner | None] = ContextVar("partitioner", default=None)


@contextmanager
def by(partitioner: Partitioner) -> Iterator[None]:
    """Partitions models that are built inside."""
    token = _partitioner.set(partitioner)
    try:
        yield
    finally:
        _partitioner.reset(token)


def wanted() -> bool:
    """Checks whether models are partitioned now."""
    return _partitioner.get() is not None


def constructing() -> AbstractContextManager[object]:
    """Opens the context for a model's constructor, if the library of the constructor doesn't support ZeRO."""
    partitioner = _partitioner.get()
    return partitioner.constructing() if partitioner else nullcontext()


def whole(parameter: torch.Tensor) -> AbstractContextManager[object]:
    """Opens the context to set a parameter's values in."""
    partitioner = _partitioner.get()
    return partitioner.whole(parameter) if partitioner else nullcontext()


def shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape of the complete parameter, of which this worker may have a part."""
    partitioner = _partitioner.get()
    return partitioner.shape(parameter) if partitioner else division.shape(parameter)


@torch.no_grad()
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a value into a parameter, also into one that ZeRO-3 has partitioned."""
    with partitioning.whole(parameter):
        parameter.copy_(value)
