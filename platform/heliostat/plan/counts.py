"""Holds the counts of a job's model as plain data: its parameters, its activations, and the operations of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from heliostat.optim.optimizers import Optimizer

ALWAYS, AT_STAGE_3 = 1, 2  # values of `replayed`: when an operation is recomputed
MATMUL, CONVOLUTION, ATTENTION, MEMORY = KINDS = ("matmul", "convolution", "attention", "memory")


@dataclass(frozen=True)
class ModelStats:
    """Describes one model: the shape of every parameter, the frozen parameters, persistent buffers, and the FLOPs of one sample.

    Shared parameters are counted once.
    """

    shapes: dict[str, tuple[int, ...]]
    frozen: frozenset[str]
    buffers: dict[str, tuple[tuple[int, ...], str]]  # persistent buffers: (shape, dtype)
    layer: int  # maximum number of parameters that ZeRO-3 gathers at once: one module's, without its submodules'
    active: int  # number of parameters that process one token
    stacked: frozenset[str]  # parameters that contain all experts of a layer
    sent: int  # elements per sample and forward pass that travel from tokens to experts and back
    flops: float  # 0 if the recipe doesn't state the FLOPs; then `activations` counts them
    groups: list[list[str]]  # names of the parameters in each parameter group of the optimizer
    hidden: frozenset[str]  # matrices that are in separate groups of an orthogonalizing optimizer
    packed: int = 0  # weights that are stored in 4 bits, which aren't in `shapes`
    frozen_models: tuple[int, int] = (0, 0)  # bytes of other models and of 4-bit weights (in every step, in evaluations)
    divided: dict[str, str] = field(default_factory=dict)  # tensor-parallel sharding: `column` (by outputs) or `row` (by inputs)

    @property
    def parameters(self) -> int:
        return self.packed + sum(math.prod(s) for s in self.shapes.values())

    def own(self, parts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape that every parameter has on one of `parts` tensor-parallel workers."""
        return {n: _part(s, self.divided.get(n, ""), parts) for n, s in self.shapes.items()}

    def added(self) -> tuple[int, int]:
        """Counts the elements per token that tensor-parallel workers all-reduce. Returns two numbers: for a forward pass (outputs
        of row-parallel matrices), and for a backward pass (gradients of the inputs of column-parallel matrices)."""
        return sum(s[0] for s in self._divided("row")), sum(s[1] for s in self._divided("column"))

    def sums(self) -> tuple[int, int]:
        """Counts the all-reduces of tensor-parallel workers: one per row-parallel matrix in a forward pass, and one per
        column-parallel matrix in a backward pass."""
        return len(self._divided("row")), len(self._divided("column"))

    def _divided(self, kind: str) -> list[tuple[int, ...]]:
        return [self.shapes[n] for n, way in self.divided.items() if way == kind and len(self.shapes[n]) > 1]

    def kept(self, optimizer: Optimizer) -> dict[str, tuple[str, ...]]:
        """Maps the name of every trained parameter to the keys of its optimizer state."""
        return {name: optimizer.kept(name in self.hidden) for name in self.trained}

    def groups_of(self, optimizer: Optimizer) -> list[list[str]]:
        """Lists the names of the parameters in each parameter group of an optimizer. If the optimizer orthogonalizes, hidden
        matrices are in groups of their own."""
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
    """Describes the temporary memory of a tiled MLP's backward pass. `rows`: maximum tokens of a tile. `each`: bytes per token of
    a tile. `sums`: bytes of the summed gradients of the weights."""

    rows: int
    each: int
    sums: int

    def held(self, tokens: int) -> int:
        return self.sums + self.each * min(self.rows, tokens)


@dataclass(frozen=True)
class Activations:
    """Holds the bytes that the forward pass of one sample keeps for the backward pass.

    `outside`: bytes outside the layers that activation checkpointing wraps. `layers`: for each layer, the bytes of its input,
    the bytes of everything that it keeps, and the bytes that selective checkpointing keeps.
    """

    outside: int
    layers: tuple[tuple[int, int, int], ...]
    largest: int  # bytes of the largest tensor; another tensor of this size exists temporarily
    flops: float = 0.0  # FLOPs of the forward and backward pass, if they were counted
    tile: Tile | None = None  # temporary memory of tiled MLPs
    batch: int = 0  # bytes of the sample itself
    singly: bool = True  # transformers checkpoints each layer separately, so a job can checkpoint some layers, or parts of layers

    @property
    def kept(self) -> int:
        return self.held(0)

    @property
    def checkpointed(self) -> int:
        return self.held(len(self.layers))

    def held(self, first: int, offload: bool = False) -> int:
        """Computes the peak bytes if the first `first` layers are checkpointed. The peak is either after the forward pass, or
        during the recomputation of one of these layers, after the backward pass of all later layers. `offload`: whether all
        inputs of these layers except one are on the host."""
        inputs, inside = [inputs for inputs, _, _ in self.layers], [kept for _, kept, _ in self.layers]
        stored = max(inputs[:first], default=0) if offload else self.inputs(first)
        return self.outside + stored + max(sum(inside[first:]), max(inside[:first], default=0))

    def selective(self) -> int:
        """Computes the peak bytes if all layers keep only the outputs of expensive operations. The peak is either after the
        forward pass, or during the recomputation of a layer, while all earlier layers still keep their outputs."""
        waiting = most = 0
        for _, inside, dear in self.layers:
            most = max(most, waiting + max(inside, dear))
            waiting += dear
        return self.outside + self.inputs(len(self.layers)) + most

    def inputs(self, first: int) -> int:
        return sum(inputs for inputs, _, _ in self.layers[:first])


@dataclass(frozen=True)
class OperationWork:
    """Describes `count` equal operations of a step. Each operation has:

    - `flops`, `moved`: the FLOPs and bytes that one sample adds;
    - `fixed`: the bytes that the operation moves for any number of samples;
    - `replayed`: when the operation is recomputed if its layer is checkpointed: 0 (never), ALWAYS, or AT_STAGE_3;
    - `dear`: whether the operation is expensive, so that selective checkpointing keeps its outputs.
    """

    kind: str
    count: int
    flops: float
    moved: float
    fixed: float
    replayed: int
    dear: bool


@dataclass(frozen=True)
class Counts:
    """Holds everything that a plan needs to know about a model."""

    model: ModelStats
    kept: Activations
    work: tuple[OperationWork, ...]
