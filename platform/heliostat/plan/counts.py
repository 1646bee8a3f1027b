"""Holds the counts of a job's model as plain data: its parameters, its activations, and the operations of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from heliostat.optim.optimizers import Optimizer

ALWAYS, AT_STAGE_3 = 1, 2  # when an operation is recomputed
MATMUL, CONVOLUTION, ATTENTION, MEMORY = KINDS = ("matmul", "convolution", "attention", "memory")


@dataclass(frozen=True)
class ModelStats:
    """Describes one model: the shape of every parameter, the frozen parameters, persistent buffers, and the FLOPs of one sample.

    Shared parameters are counted once.
    """

    shapes: dict[str, tuple[int, ...]]
    frozen: frozenset[str]
    buffers: dict[str, tuple[tuple[int, ...], str]]  # persistent ones: shape, dtype
    layer: int  # the most parameters that ZeRO-3 gathers at once: one module's, without its submodules'
    active: int  # parameters that process one token
    stacked: frozenset[str]  # parameters that hold all experts of a layer
    sent: int  # elements per sample and forward pass that tokens send to experts, and back
    flops: float  # 0: the recipe doesn't state it, and `activations` counts it
    groups: list[list[str]]  # the optimizer's parameter groups, by name
    hidden: frozenset[str]  # matrices that an orthogonalizing optimizer has in separate groups
    frozen_models: tuple[int, int] = (0, 0)  # bytes of other models on the device: (in every step, in evaluations)
    divided: dict[str, str] = field(default_factory=dict)  # by `train.parallel.tensor`: `column` (by outputs), `row` (by inputs)

    @property
    def parameters(self) -> int:
        return sum(math.prod(s) for s in self.shapes.values())

    def own(self, parts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter on one of `parts` tensor-parallel workers."""
        return {n: _part(s, self.divided.get(n, ""), parts) for n, s in self.shapes.items()}

    def added(self) -> tuple[int, int]:
        """Counts the elements per token that tensor-parallel workers add up: outputs of row-parallel matrices in a forward pass,
        and gradients of the inputs of column-parallel matrices in a backward pass."""
        return sum(s[0] for s in self._divided("row")), sum(s[1] for s in self._divided("column"))

    def sums(self) -> tuple[int, int]:
        """Counts the sums over tensor-parallel workers: one per row-parallel matrix in a forward pass, and one per
        column-parallel matrix in a backward pass."""
        return len(self._divided("row")), len(self._divided("column"))

    def _divided(self, kind: str) -> list[tuple[int, ...]]:
        return [self.shapes[n] for n, way in self.divided.items() if way == kind and len(self.shapes[n]) > 1]

    def kept(self, optimizer: Optimizer) -> dict[str, tuple[str, ...]]:
        """Lists the keys of the optimizer's state of every trained parameter, by name."""
        return {name: optimizer.kept(name in self.hidden) for name in self.trained}

    def groups_of(self, optimizer: Optimizer) -> list[list[str]]:
        """Lists an optimizer's parameter groups, by name. An orthogonalizing optimizer has hidden matrices in separate groups."""
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
    """Describes the temporary memory of a tiled MLP's backward pass: at most `rows` tokens at once, `each` bytes per token, and
    `sums` bytes of summed gradients."""

    rows: int
    each: int
    sums: int

    def held(self, tokens: int) -> int:
        return self.sums + self.each * min(self.rows, tokens)


@dataclass(frozen=True)
class Activations:
    """Holds the bytes that one sample's forward pass keeps for the backward pass.

    `outside`: bytes outside the layers that activation checkpointing wraps. `layers`: for each layer, the bytes of its input, of
    everything that it keeps, and of what selective checkpointing keeps.
    """

    outside: int
    layers: tuple[tuple[int, int, int], ...]
    largest: int  # the largest tensor; one more of its size exists temporarily
    flops: float = 0.0  # of the forward and backward pass, if counted
    tile: Tile | None = None  # of tiled MLPs
    batch: int = 0  # bytes of the sample itself
    singly: bool = True  # transformers checkpoints layers one by one: so a job can checkpoint some, or parts of each

    @property
    def kept(self) -> int:
        return self.held(0)

    @property
    def checkpointed(self) -> int:
        return self.held(len(self.layers))

    def held(self, first: int, offload: bool = False) -> int:
        """Computes the peak bytes if the first `first` layers are checkpointed. The peak is after the forward pass, or while one
        of these layers is recomputed, when the later layers are done. `offload`: all their inputs except one are on the host."""
        inputs, inside = [inputs for inputs, _, _ in self.layers], [kept for _, kept, _ in self.layers]
        stored = max(inputs[:first], default=0) if offload else self.inputs(first)
        return self.outside + stored + max(sum(inside[first:]), max(inside[:first], default=0))

    def selective(self) -> int:
        """Computes the peak bytes if all layers keep only the outputs of expensive operations. The peak is after the forward
        pass, or while a layer is recomputed and the layers before it wait."""
        waiting = most = 0
        for _, inside, dear in self.layers:
            most = max(most, waiting + max(inside, dear))
            waiting += dear
        return self.outside + self.inputs(len(self.layers)) + most

    def inputs(self, first: int) -> int:
        return sum(inputs for inputs, _, _ in self.layers[:first])


@dataclass(frozen=True)
class OperationWork:
    """Describes `count` equal operations of a step, each with:

    - `flops`, `moved`: the FLOPs and bytes that one sample adds;
    - `fixed`: the bytes that it moves at any number of samples;
    - `replayed`: when it is recomputed if its layer is checkpointed: 0 (never), ALWAYS, or AT_STAGE_3;
    - `dear`: whether selective checkpointing keeps its outputs.
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
