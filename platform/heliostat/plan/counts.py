"""Holds what a job's model was counted to need, as plain data: parameters, activations, operations of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from heliostat.config.optimizers import Optimizer

MATMUL, CONVOLUTION, ATTENTION, MEMORY = KINDS = ("matmul", "convolution", "attention", "memory")


@dataclass(frozen=True)
class ModelStats:
    """Describes one model: the shape of every parameter, the frozen ones, persistent buffers, and the FLOPs of one sample.

    Shared parameters are counted once.
    """

    shapes: dict[str, tuple[int, ...]]
    frozen: frozenset[str]
    buffers: dict[str, tuple[tuple[int, ...], str]]  # persistent ones: shape, dtype
    layer: int  # parameters of the largest module without submodules of its own kind: what ZeRO-3 gathers at once
    active: int  # parameters that one token meets
    stacked: frozenset[str]  # those that hold all experts of a layer
    sent: int  # elements that a sample's tokens are to experts in a forward pass, there and back
    flops: float  # 0: the recipe does not say, and `activations` counts
    groups: list[list[str]]  # the optimizer's, by names
    hidden: frozenset[str]  # matrices that an optimizer that orthogonalizes has in groups apart
    frozen_models: tuple[int, int] = (0, 0)  # bytes of models beside it on the device: in every step; in evaluations, with those

    @property
    def parameters(self) -> int:
        return sum(math.prod(s) for s in self.shapes.values())

    def kept(self, optimizer: Optimizer) -> dict[str, tuple[str, ...]]:
        """Lists the optimizer state of every trained parameter, by names."""
        return {name: optimizer.kept(name in self.hidden) for name in self.trained}

    def groups_of(self, optimizer: Optimizer) -> list[list[str]]:
        """Lists the parameter groups of an optimizer, by names."""
        if not optimizer.orthogonalizes:
            return self.groups
        halves = ([[n for n in names if (n in self.hidden) == hidden] for hidden in (True, False)] for names in self.groups)
        return [names for half in halves for names in half if names]

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        return {n: s for n, s in self.shapes.items() if n not in self.frozen}


@dataclass(frozen=True)
class Activations:
    """Holds the bytes that one sample's forward pass keeps for the backward pass, with and without activation checkpointing."""

    kept: int
    checkpointed: int
    largest: int  # the largest single tensor: there is one more of it for a moment
    flops: float = 0.0  # of the forward and backward pass, if they were to be counted


@dataclass(frozen=True)
class Work:
    """Describes equal operations of a step: how many, and of each the FLOPs and bytes that a sample adds, and the bytes that it
    moves whatever the number of samples."""

    kind: str
    count: int
    flops: float
    moved: float
    fixed: float
    replayed: bool


@dataclass(frozen=True)
class Counts:
    """Holds all that a plan takes from the model itself."""

    model: ModelStats
    kept: Activations
    work: tuple[Work, ...]
