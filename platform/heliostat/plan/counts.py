"""Holds what a job's model was counted to need, as plain data: parameters, activations, operations of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from heliostat.optim.optimizers import Optimizer

ALWAYS, AT_STAGE_3 = 1, 2  # when an operation is computed again
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
    frozen_models: tuple[int, int] = (0, 0)  # bytes of other models on the device: in every step; in evaluations, with those
    divided: dict[str, str] = field(default_factory=dict)  # what workers can divide: `column` by outputs, `row` by inputs

    @property
    def parameters(self) -> int:
        return sum(math.prod(s) for s in self.shapes.values())

    def own(self, parts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter on one of so many workers that divide matrices."""
        return {n: _part(s, self.divided.get(n, ""), parts) for n, s in self.shapes.items()}

    def added(self) -> tuple[int, int]:
        """Counts the elements of a token that workers which divide matrices add up: in a forward pass, products of inputs; in a
        backward pass, gradients of inputs that all have."""
        return sum(s[0] for s in self._divided("row")), sum(s[1] for s in self._divided("column"))

    def sums(self) -> tuple[int, int]:
        """Counts the sums of a forward pass and of a backward pass: one for each matrix of outputs, and for each of inputs."""
        return len(self._divided("row")), len(self._divided("column"))

    def _divided(self, kind: str) -> list[tuple[int, ...]]:
        return [self.shapes[n] for n, way in self.divided.items() if way == kind and len(self.shapes[n]) > 1]

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


def _part(shape: tuple[int, ...], kind: str, parts: int) -> tuple[int, ...]:
    if kind == "row":
        return shape[0], shape[1] // parts
    return (shape[0] // parts, *shape[1:]) if kind == "column" else shape


@dataclass(frozen=True)
class Tile:
    """Describes what the backward pass of an MLP in tiles holds for a moment: of so many tokens at once, bytes of each and of
    sums of gradients."""

    rows: int
    each: int
    sums: int

    def held(self, tokens: int) -> int:
        return self.sums + self.each * min(self.rows, tokens)


@dataclass(frozen=True)
class Activations:
    """Holds the bytes that one sample's forward pass keeps for the backward pass: outside of the layers that activation
    checkpointing wraps, and of each layer those of its input, what is kept inside, and what selective checkpointing keeps."""

    outside: int
    layers: tuple[tuple[int, int, int], ...]
    largest: int  # the largest single tensor: there is one more of it for a moment
    flops: float = 0.0  # of the forward and backward pass, if they were to be counted
    tile: Tile | None = None  # of MLPs in tiles
    batch: int = 0  # bytes of the sample itself
    singly: bool = True  # transformers checkpoints the layers one by one, so some alone, or each in part, can be

    @property
    def kept(self) -> int:
        return self.held(0)

    @property
    def checkpointed(self) -> int:
        return self.held(len(self.layers))

    def held(self, first: int, offload: bool = False) -> int:
        """Computes the most bytes where the first so many layers are checkpointed: after the forward pass, or while one of them
        is computed again, when those after it are done. `offload`: their inputs are on the host, except one."""
        inputs, inside = [inputs for inputs, _, _ in self.layers], [kept for _, kept, _ in self.layers]
        stored = max(inputs[:first], default=0) if offload else self.inputs(first)
        return self.outside + stored + max(sum(inside[first:]), max(inside[:first], default=0))

    def selective(self) -> int:
        """Computes the most bytes where all layers keep the expensive operations alone: after the forward pass, or while the last
        layer is computed again, and those before it wait."""
        waiting = most = 0
        for _, inside, dear in self.layers:
            most = max(most, waiting + max(inside, dear))
            waiting += dear
        return self.outside + self.inputs(len(self.layers)) + most

    def inputs(self, first: int) -> int:
        return sum(inputs for inputs, _, _ in self.layers[:first])


@dataclass(frozen=True)
class OperationWork:
    """Describes equal operations of a step: how many, and of each the FLOPs and bytes that a sample adds, the bytes that it moves
    whatever the number of samples, whether it is computed again where its layer is checkpointed (0 for no, ALWAYS, or
    AT_STAGE_3), and whether selective checkpointing keeps its outputs."""

    kind: str
    count: int
    flops: float
    moved: float
    fixed: float
    replayed: int
    dear: bool


@dataclass(frozen=True)
class Counts:
    """Holds all that a plan takes from the model itself."""

    model: ModelStats
    kept: Activations
    work: tuple[OperationWork, ...]
