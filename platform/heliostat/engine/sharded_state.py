"""Gives access to the training state that a backend shards over the workers. Every other module reads and writes this state here.

    sharded = sharded_state.of(engine)
    sharded.tensors()             # named views of master weights, moments, and buffers, to save; `whole=True`: to load into
    sharded.slices("exp_avg")     # views of one kind, by parameter
    sharded.after_load(steps)     # makes the forward pass use the values in the views

At every stage, a worker has one slice [start, start + n) of each flattened parameter: of its fp32 master weight, and of its
moments (the optimizer's state). If workers split the parameter (`division`), the worker has a slice of its own part. A
`FlatShard` contains one slice, so a checkpoint loads in any parallelism configuration. The names of tensors are:

- `master.<parameter>`: fp32 master weights;
- `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, ...: moments, as the optimizer's class in `heliostat.optim.optimizers` names
  them;
- `buffer.<name>`: persistent buffers;
- `frozen.<parameter>`: parameters that aren't trained, in the precision that the engine keeps them in. The base of an adapter
  isn't saved (`recipes.adapters`).

`zero_state` is the backend for DeepSpeed's ZeRO. Another backend, such as FSDP2, is one file with one subclass of `ShardedState`:

- memory of the optimizer: `optimizer`, `groups`, `place`, and `original`, which locates a slice in a second way, so that `prove`
  can compare both;
- weights that the forward pass uses: `weights`, `refresh`, `release`, `gathered`;
- values assembled from all workers, for comparisons: `full`, `full_gradient`;
- workers with the same state: `replicas`, `weight_replicas`, `matrix_part`;
- counts: `steps`, `loss_scale`, `read_loss_scale`, `write_loss_scale`.

Gradients have no slices here. A backend moves gradients from buffer to buffer until the optimizer's step, and no caller needs a
part of a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.layout import FROZEN
from heliostat.errors import ConfigError, TrainingError
from heliostat.parallel import division
from heliostat.recipes.adapters import Base, is_base

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MASTER = "master"
Moments = Mapping[torch.nn.Parameter, Sequence[str]]
Replica = tuple[int, int]  # (index of this worker, number of workers)


class SlicePlace(NamedTuple):
    """Locates this worker's slice of a parameter in the optimizer's memory: `numel` elements of `flat`, from `offset` on. `flat`:
    a tensor that the optimizer steps. `start`: the position in this worker's part of the parameter where the slice begins."""

    flat: torch.Tensor
    offset: int
    numel: int
    start: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a view of the slice's elements in `tensor`, which is `flat` or a tensor of the optimizer state of `flat`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class ShardedState(ABC):
    """Gives named views of this worker's training state. A backend implements the abstract methods.

    - `optimizer`: steps the tensors of `groups`.
    - `moments`: the keys of the optimizer state, by trained parameter. Moments in `copies` begin as the master weight, others as
      0.
    - `replicas`: this worker's index among the workers that have the same slices, and the number of these workers.
    - `weight_replicas`: the same two numbers for workers that have the same parts of the parameters that aren't trained.
    - `matrix_part`: this worker's index among the workers that shard matrices together, and the number of these workers.
    - `base`: the base of a model that trains an adapter, which checkpoints name by its digest.
    """

    base: Base | None = None
    optimizer: torch.optim.Optimizer
    replicas: Replica = (0, 1)
    weight_replicas: Replica = (0, 1)
    matrix_part: Replica = (0, 1)

    def __init__(self, module: torch.nn.Module, moments: Moments, copies: Collection[str]) -> None:
        self.module, self.moments, self.copies = module, moments, copies

    # implemented by every backend ------------------------------------------------------------------------------------

    @abstractmethod
    def groups(self) -> list[tuple[torch.Tensor, list[torch.nn.Parameter]]]:
        """Lists the fp32 tensors that the optimizer steps, each with its parameters."""

    @abstractmethod
    def place(self, p: torch.nn.Parameter) -> SlicePlace | None:
        """Locates this worker's slice of a trained parameter in the optimizer's own memory. Returns None if the worker has no
        slice."""

    @abstractmethod
    def original(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        """Returns the flat tensor that the backend itself reads for a parameter's slice, without using `place`. It contains the
        moment `key`, or the master weight (None), and may end with padding."""

    @abstractmethod
    def weights(self, p: torch.nn.Parameter) -> tuple[torch.Tensor, int] | None:
        """Returns a flat view of this worker's part of a weight, as the forward pass uses the weight, and the part's start in the
        parameter. Returns None if the part is in a file."""

    @abstractmethod
    def refresh(self) -> None:
        """Copies the master weights into the weights that the forward pass uses. Collective."""

    @abstractmethod
    def full(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        """Assembles the moment `key` of this worker's part of a parameter. If `key` is None, assembles the part's fp32 master
        weight. Collective."""

    @abstractmethod
    def full_gradient(self, p: torch.nn.Parameter) -> torch.Tensor | None:
        """Assembles the gradient of the backward passes since the last step, times `loss_scale`. Returns None if there is no
        gradient. Collective."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Counts the optimizer's steps, without the fp16 steps that were skipped because of overflow."""

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """Returns the factor by which gradients are scaled until the step. The factor is 1 except in fp16."""

    @abstractmethod
    def read_loss_scale(self) -> dict[str, float] | None:
        """Reads the state of the dynamic loss scale for a checkpoint. Returns None if the loss scale is fixed, or if there is no
        loss scale."""

    @abstractmethod
    def write_loss_scale(self, values: dict[str, float] | None) -> str | None:
        """Restores the dynamic loss scale from a checkpoint. Returns a message if the engine needs a loss scale that the
        checkpoint lacks."""

    # implemented by backends that shard the weights, or that link moments to parameters

    def gathered(self, p: torch.nn.Parameter) -> AbstractContextManager[object]:
        """Opens a context in which a parameter has its complete weight, in the forward pass's precision. Collective."""
        return nullcontext()

    def release(self) -> None:  # noqa: B027
        """Releases weights that are still gathered from the last forward pass."""

    def link(self) -> None:  # noqa: B027
        """Links parameters to their moments, which were just created."""

    # named views -----------------------------------------------------------------------------------------------------

    def tensors(self, whole: bool = False) -> dict[str, torch.Tensor]:
        """Returns views of this worker's slices of all training state. Loading into these views changes the engine.

        If several workers have the same slice, each worker saves a part of it. `whole`: returns complete slices, to load into. If
        all workers of a tensor-parallel group have the same state, only the first worker saves this state.
        """
        persistent = self.module.state_dict().keys()
        buffers = {f"buffer.{name}": b for name, b in self.module.named_buffers() if name in persistent}
        return {f"{key}.{name}": s if whole else self.share(p, s) for name, p, key, s in self._views()} | buffers

    def slices(self, kind: str) -> dict[str, FlatShard]:
        """Returns views of this worker's slices of the master weights (`MASTER`), or of a moment, by parameter name."""
        return {name: shard for name, _, key, shard in self._views() if key == kind}

    def frozen(self, whole: bool = False) -> dict[str, FlatShard]:
        """Returns views of this worker's slices of the parameters that aren't trained, by name. Leaves out the base of an
        adapter. Raises ConfigError if such a parameter is in a file.

        If several workers have the same slice, each worker saves a part of it. `whole`: returns complete slices, to load into.
        """
        out: dict[str, FlatShard] = {}
        for name, p in self.module.named_parameters():
            if not p.requires_grad and not is_base(p):
                if (part := self.weights(p)) is None:
                    raise ConfigError(
                        f"train.zero.offload.param: nvme offload doesn't support parameters that aren't trained, "
                        f"such as {name!r}. Set this key to cpu"
                    )
                shard = division.placed(p, *part)
                out[f"{FROZEN}.{name}"] = shard if whole else self._part(p, shard, self.weight_replicas)
        return out

    def share(self, p: torch.nn.Parameter, shard: FlatShard) -> FlatShard:
        """Returns the part of a trained parameter's slice that this worker saves. If other workers have the same slice, each
        worker saves an equal part."""
        return self._part(p, shard, self.replicas)

    def saves_all(self) -> bool:
        """Returns whether each worker saves all of its state."""
        return self.replicas[1] == self.matrix_part[1] == 1

    def trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yields the names of the trained parameters, and the parameters."""
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def _views(self) -> Iterator[tuple[str, torch.nn.Parameter, str, FlatShard]]:
        """Yields this worker's slices of master weights and moments, as (name, parameter, kind, slice)."""
        for name, p in self.trained():
            if place := self.place(p):
                state: Any = self.optimizer.state[place.flat] if self.moments[p] else {}
                for key, tensor in [(MASTER, place.flat), *((k, state[k]) for k in self.moments[p])]:
                    yield name, p, key, division.placed(p, place.of(tensor), place.start)

    def _part(self, p: torch.nn.Parameter, shard: FlatShard, replica: Replica) -> FlatShard:
        """Cuts a slice into equal parts, one for each worker that has the slice, and returns this worker's part. If all
        tensor-parallel workers have the complete parameter, only the first worker saves the parameter."""
        (number, count), numel = replica, shard.local.numel()
        if self.matrix_part[0] > 0 and division.of(p).parts == 1:
            return shard.cut(0, 0)
        per = -(-numel // count)
        return shard.cut(min(number * per, numel), min((number + 1) * per, numel))

    # changing all state ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Creates the optimizer state before the first step, so that checkpoints can be loaded into it. Raises TrainingError if
        the backend doesn't read the values that heliostat writes into the state's slices.

        New runs also need the optimizer state before the first step. DeepSpeed links parameters to their moments after the first
        parameter group's first step, when the other groups have no moments yet.
        """
        states, fused = self.optimizer.state, self.optimizer.defaults.get("fused")
        for tensor, group in self.groups():
            if tensor not in states:
                states[tensor] = {"step": torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")}
                for k in self.moments[group[0]]:
                    states[tensor][k] = tensor.detach().clone() if k in self.copies else torch.zeros_like(tensor)
        self.link()
        self.prove()

    def prove(self) -> None:
        """Raises TrainingError unless the backend reads the values that are written into the slices.

        Restores and the EMA write into the slices. If a slice were a copy, training would continue with other weights, without an
        error. So this method writes a number into both ends of each slice, looks for this number in the backend's own tensor, and
        restores the values.
        """
        ends = []
        for name, p, key, shard in self._views():
            if numel := shard.local.numel():
                original = self.original(p, None if key == MASTER else key)
                ends.append((f"{key}.{name}", _ends(shard.local), _ends(original[:numel])))
        before = [mine.clone() for _, mine, _ in ends]
        try:
            for number, (_, mine, _) in enumerate(ends, 1):
                mine.fill_(-number)
            lost = [name for name, mine, its in ends if mine.device != its.device or not torch.equal(mine, its)]
        finally:
            for (_, mine, _), values in zip(ends, before, strict=True):
                mine.copy_(values)
        if lost:
            raise TrainingError(
                f"train.zero: heliostat can't restore {len(lost)} tensors, for example {lost[0]!r}, because DeepSpeed doesn't "
                f"read the values that heliostat writes ({self}). Install the version of DeepSpeed that heliostat requires"
            )

    def after_load(self, steps: int) -> None:
        """Completes a restore after the slices were loaded: sets the step count, and updates the weights that the forward pass
        uses."""
        for values in self.optimizer.state.values():
            values["step"].fill_(float(steps))
        self.refresh()


def of(engine: DeepSpeedEngine) -> ShardedState:
    """Returns the training state of an engine that `deepspeed_engine.build_engine` has built."""
    return engine.sharded_state


def _ends(values: torch.Tensor) -> torch.Tensor:
    """Returns a view of the first and the last element of a flat tensor."""
    return values[:: max(1, values.numel() - 1)]
