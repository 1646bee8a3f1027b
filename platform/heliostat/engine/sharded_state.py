"""Owns the training state that a backend shards over the workers: every other module reads and writes it here.

    sharded = sharded_state.of(engine)
    sharded.tensors()             # named views of master weights, moments, and buffers, to save; `whole=True`: to load into
    sharded.slices("exp_avg")     # views of one kind, by parameter
    sharded.after_load(steps)     # the forward pass uses what was written into the views

Whatever the stage, a worker's share of a parameter's fp32 master weight and of its moments (the optimizer's state) is a slice
[start, start + n) of the flattened parameter, or of this worker's part of it where workers divide it (`division`). A `FlatShard`
holds just that, so a checkpoint saved at one layout loads at any other. Names: `master.<parameter>` and, as the optimizer's class
in `heliostat.optim.optimizers` says, `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, ...; persistent buffers are
`buffer.<name>`, and parameters that are not trained `frozen.<parameter>`, in the precision that the engine holds them in.

`zero_state` is the backend: DeepSpeed's ZeRO. Another one (FSDP2, for example) is one file with one subclass of `ShardedState`:

- where the optimizer's memory is: `optimizer`, `groups`, `place`, and `original`, which finds it in another way, for the proof;
- the weights that the forward pass uses: `weights`, `refresh`, `release`, `gathered`;
- values assembled over the workers, for comparisons: `full`, `full_gradient`;
- which workers hold the same: `replicas`, `weight_replicas`, `matrix_part`;
- counts: `steps`, `loss_scale`, `read_loss_scale`, `write_loss_scale`.

Gradients have no slices here: a backend moves them from buffer to buffer until its step, and no caller needs a part of one.
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

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MASTER = "master"
Moments = Mapping[torch.nn.Parameter, Sequence[str]]
Replica = tuple[int, int]  # which of how many workers


class SlicePlace(NamedTuple):
    """Describes where the optimizer keeps this worker's slice of a parameter: `numel` elements from `offset` on of `flat`, a
    tensor that it steps. `start`: where the slice begins in this worker's part of the parameter."""

    flat: torch.Tensor
    offset: int
    numel: int
    start: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Views the slice's elements in `flat`, or in the state that the optimizer keeps of it."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class ShardedState(ABC):
    """Hands out named views of the state that this worker holds; a backend gives what is abstract.

    `optimizer`: steps the tensors of `groups`. `moments`: the keys of its state of each trained parameter; those in `copies`
    begin as the master weight, others as zeros. `replicas`: which of how many workers with the same slices this one is;
    `weight_replicas`: with the same parts of parameters that are not trained; `matrix_part`: of the workers that divide matrices.
    """

    optimizer: torch.optim.Optimizer
    replicas: Replica = (0, 1)
    weight_replicas: Replica = (0, 1)
    matrix_part: Replica = (0, 1)

    def __init__(self, module: torch.nn.Module, moments: Moments, copies: Collection[str]) -> None:
        self.module, self.moments, self.copies = module, moments, copies

    # what a backend gives --------------------------------------------------------------------------------------------

    @abstractmethod
    def groups(self) -> list[tuple[torch.Tensor, list[torch.nn.Parameter]]]:
        """Lists the fp32 tensors that the optimizer steps, with the parameters in each."""

    @abstractmethod
    def place(self, p: torch.nn.Parameter) -> SlicePlace | None:
        """Finds this worker's slice of a trained parameter, in the optimizer's own memory; None if it has none."""

    @abstractmethod
    def original(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        """Returns the flat tensor that the backend itself reads for a parameter's slice, padded or not, found without `place`:
        of the moment `key`, or of the master weight."""

    @abstractmethod
    def weights(self, p: torch.nn.Parameter) -> tuple[torch.Tensor, int] | None:
        """Views this worker's part of the weight that the forward pass uses, in its precision, and where it begins; None if it
        is in a file."""

    @abstractmethod
    def refresh(self) -> None:
        """Copies the master weights into the weights that the forward pass uses; collective."""

    @abstractmethod
    def full(self, p: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        """Assembles the moment `key` of this worker's part of a parameter, or its fp32 master weight; collective."""

    @abstractmethod
    def full_gradient(self, p: torch.nn.Parameter) -> torch.Tensor | None:
        """Assembles the gradient of the backward passes since the last step, times `loss_scale`; None if the parameter has none.
        Collective."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Counts the steps that the optimizer has made (with fp16, overflowing steps are skipped)."""

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """Returns the factor that gradients have until the step: 1 except in fp16."""

    @abstractmethod
    def read_loss_scale(self) -> dict[str, float] | None:
        """Reads the state of the dynamic loss scale for a checkpoint; None where there is no loss scale, or it is fixed."""

    @abstractmethod
    def write_loss_scale(self, values: dict[str, float] | None) -> str | None:
        """Restores the dynamic loss scale from a checkpoint; returns a notice if the engine needs one and there is none."""

    # what it gives where it shards the weights, or where the optimizer alone does not know the moments

    def gathered(self, p: torch.nn.Parameter) -> AbstractContextManager[object]:
        """Opens the context in which a parameter holds the weight that the forward pass uses; collective."""
        return nullcontext()

    def release(self) -> None:  # noqa: B027
        """Gives up weights that are still gathered from the last forward pass."""

    def link(self) -> None:  # noqa: B027
        """Connects parameters with their moments, which have just been created."""

    # named views -----------------------------------------------------------------------------------------------------

    def tensors(self, whole: bool = False) -> dict[str, torch.Tensor]:
        """Returns this worker's slices of all training state, as views: loading into them changes the engine.

        What several workers hold the same slice of, each saves a part of, and loads the `whole`. What all workers of a group that
        divides matrices hold, the first of them saves.
        """
        persistent = self.module.state_dict().keys()
        buffers = {f"buffer.{name}": b for name, b in self.module.named_buffers() if name in persistent}
        return {f"{key}.{name}": s if whole else self.share(p, s) for name, p, key, s in self._views()} | buffers

    def slices(self, kind: str) -> dict[str, FlatShard]:
        """Returns this worker's slices of the master weights (`MASTER`), or of a moment, by parameter, as views."""
        return {name: shard for name, _, key, shard in self._views() if key == kind}

    def frozen(self, whole: bool = False) -> dict[str, FlatShard]:
        """Returns this worker's slices of the parameters that are not trained, as views.

        What several workers hold the same of, each saves a part of, and loads the `whole`.
        """
        out: dict[str, FlatShard] = {}
        for name, p in self.module.named_parameters():
            if not p.requires_grad:
                if (part := self.weights(p)) is None:
                    raise ConfigError(f"train.zero.offload.param: nvme doesn't support {name!r}, which isn't trained. Use cpu")
                shard = division.placed(p, *part)
                out[f"{FROZEN}.{name}"] = shard if whole else self._part(p, shard, self.weight_replicas)
        return out

    def share(self, p: torch.nn.Parameter, shard: FlatShard) -> FlatShard:
        """Cuts the part of a trained parameter's slice that this worker saves, where others hold the same."""
        return self._part(p, shard, self.replicas)

    def saves_all(self) -> bool:
        """Returns whether each worker saves all that it holds."""
        return self.replicas[1] == self.matrix_part[1] == 1

    def trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yields the parameters that are trained, with their names."""
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def _views(self) -> Iterator[tuple[str, torch.nn.Parameter, str, FlatShard]]:
        """Yields each slice of a master weight and of a moment that this worker has, with its parameter and its kind."""
        for name, p in self.trained():
            if place := self.place(p):
                state: Any = self.optimizer.state[place.flat] if self.moments[p] else {}
                for key, tensor in [(MASTER, place.flat), *((k, state[k]) for k in self.moments[p])]:
                    yield name, p, key, division.placed(p, place.of(tensor), place.start)

    def _part(self, p: torch.nn.Parameter, shard: FlatShard, replica: Replica) -> FlatShard:
        """Cuts a slice that so many workers hold into a part for each; what all that divide matrices have is the first one's."""
        (number, count), numel = replica, shard.local.numel()
        if self.matrix_part[0] > 0 and division.of(p).parts == 1:
            return shard.cut(0, 0)
        per = -(-numel // count)
        return shard.cut(min(number * per, numel), min((number + 1) * per, numel))

    # changing it as a whole ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Creates the optimizer state that is otherwise created at the first step, so that there is something to load into;
        TrainingError if what is written into its slices doesn't arrive.

        New runs need it too: DeepSpeed links parameters to their moments after the first parameter group's first step, when the
        other groups have none.
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
        """Raises TrainingError unless the backend reads what is written into the slices.

        Restores and the average of the weights write there. If a slice were a copy, training would continue from other weights
        without an error. So this writes another number into both ends of each slice, looks for it where the backend keeps the
        parameter, and puts the values back.
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
                f"train.zero: DeepSpeed keeps {len(lost)} tensors, {lost[0]!r} first, where a restore can't write them "
                f"({self}). Install the version of DeepSpeed that heliostat requires"
            )

    def after_load(self, steps: int) -> None:
        """Completes the engine after its slices were loaded: sets the step count, and the weights that the forward pass uses."""
        for values in self.optimizer.state.values():
            values["step"].fill_(float(steps))
        self.refresh()


def of(engine: DeepSpeedEngine) -> ShardedState:
    """Returns the state of an engine that `deepspeed_engine.build_engine` has built."""
    return engine.sharded_state


def _ends(values: torch.Tensor) -> torch.Tensor:
    """Views the first and the last element."""
    return values[:: max(1, values.numel() - 1)]
