"""Gives a model its initial weights below ZeRO stage 3, where every worker has all weights. Only the first worker makes these
weights.

The first worker sends the weights to the others one tensor at a time, from device to device, in the precision of training. With
tensor parallelism (`train.parallel.tensor`), each worker then keeps only its part. The first worker's weights come from one of
these sources:

- A pretrained folder: the first worker reads one tensor at a time (`recipes.folder_weights`), so host memory never contains
  more than one tensor.
- The recipe's `build`: the first worker's host memory contains one fp32 copy of the weights, until each tensor is sent.

All other workers build the model without weights (`recipes.weightless`). A custom recipe may read weights in its `build`, so the
first worker runs such a `build` with and without weights. If the results differ (`recipes.build_difference`), the workers of each
node build the model with weights in turns. These workers discard the weights, and keep the other results of `build`. heliostat
logs a warning with the host memory that this needs.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from heliostat.checkpoint.agreement import agreed, first, together
from heliostat.config.spec import Job
from heliostat.engine import tensor_group
from heliostat.parallel.division import of
from heliostat.recipes import build_difference, building, folder_weights, weightless
from heliostat.recipes.protocol import GUIDE, Recipe
from heliostat.text import brief

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


def build(job: Job, recipe: Recipe) -> torch.nn.Module:
    """Builds the model with its initial weights, which are equal on every worker. Collective."""
    torch.manual_seed(job.train.seed)
    if not dist.is_initialized():
        return building.build(recipe)
    making, group = _Making(job, recipe), dist.new_group(backend="gloo")
    why = first(group, making.as_first)
    if why:
        _in_turns(making, group, why)
    else:
        agreed(group, lambda: making.without_weights() if dist.get_rank() else None)
    dist.destroy_process_group(group)
    if dist.get_world_size() > 1 or making.values:
        with tensor_group.dividing(recipe, making.model, job.train.parallel.tensor):
            making.send()
    return making.model


def _in_turns(making: _Making, group: dist.ProcessGroup, why: str) -> None:
    """Builds the model with weights on the other workers, one worker per node at a time. These workers discard the weights."""
    mine = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    turns = max(together(group, lambda: mine)) + 1
    if dist.get_rank() == 0:
        log.warning(
            "recipe: %s.build needs real weights (%s). So the workers of a node call `build` one after another, in %d turns, and "
            "each worker uses %.1f GB of host memory. %s explains how `build` can work without weights.",
            type(making.recipe).__name__, why, turns, making.gigabytes, GUIDE,
        )  # fmt: skip

    def take(turn: int) -> None:
        if turn == mine and dist.get_rank():
            making.with_weights()

    for turn in range(turns):
        agreed(group, partial(take, turn))


class _Making:
    """Builds this worker's model. `values`: only on the first worker, functions that return the values of the model's tensors.
    The keys are the `id`s of the tensors."""

    model: torch.nn.Module

    def __init__(self, job: Job, recipe: Recipe) -> None:
        self.seed, self.recipe, self.values = job.train.seed, recipe, dict[int, Callable[[], torch.Tensor]]()
        self.device, self.dtype = _device(), DTYPES[job.train.precision]

    @property
    def gigabytes(self) -> float:
        return 4 * sum(p.numel() for p in self.model.parameters()) / 1e9  # in fp32

    def as_first(self) -> str:
        """Builds the first worker's model. Returns the reason why other workers can't build the model without weights, or "".

        In a run of one worker, the model stays as built, unless the weights are read from a folder.
        """
        ours, alone = type(self.recipe).build.__module__.startswith("heliostat."), dist.get_world_size() == 1
        if ours and self._is_read():
            return ""
        twin = None if ours or alone else _copied(self.recipe)
        torch.manual_seed(self.seed)
        self.model = building.build(self.recipe)
        if alone:
            return ""
        why = self._difference(twin) if twin else ""
        for p, host in weightless.empty_all(self.model):
            self.values[id(p)] = partial(_same, host.to(self.device, self._type(p)) if why else host)
        return why

    def _is_read(self) -> bool:
        """Builds the model without weights, and locates the weights in the job's folder. Returns False if heliostat can't read
        the weights one by one."""
        with weightless.building() as noted:
            self.model = building.build(self.recipe)
        try:
            self.values = {key: stored.read for key, stored in folder_weights.find(self.model, noted).items()}
        except folder_weights.UnreadableError as e:
            if noted:
                log.warning(
                    "model: the first worker loads all weights at once, because it can't load them tensor by tensor. This "
                    "needs %.1f GB of host memory (%s)",
                    self.gigabytes,
                    e,
                )
            return False
        return True

    def _difference(self, twin: Recipe) -> str:
        """Describes the first difference between a `build` with weights and a `build` without weights; "" if there is no
        difference."""
        try:
            with weightless.building():
                model = building.build(twin)
            return build_difference.find((self.recipe, self.model), (twin, model))
        except Exception as e:  # noqa: BLE001  a user's `build` can raise anything
            return f"{type(e).__name__}: {brief(str(e))}"

    def without_weights(self) -> None:
        with weightless.building():
            self.model = building.build(self.recipe)

    def with_weights(self) -> None:
        """Builds the model as the first worker does, and discards its weights. All other results of `build` stay."""
        torch.manual_seed(self.seed)
        self.model = building.build(self.recipe)
        for _ in weightless.empty_all(self.model):
            pass  # this discards each weight

    def send(self) -> None:
        """Sets all tensors of the model to the first worker's values. Parameters get the precision of training. Collective."""
        for p in self.model.parameters():
            weightless.put(p, of(p).cut(self._sent(p, building.shape(p), self._type(p))))
        sent: dict[int, torch.Tensor] = {}  # a buffer that several modules share stays shared
        for name, buffer in list(self.model.named_buffers(remove_duplicate=False)):
            if id(buffer) not in sent:
                sent[id(buffer)] = self._sent(buffer, tuple(buffer.shape), buffer.dtype)
            building.put_buffer(self.model, name, sent[id(buffer)])

    def _type(self, parameter: torch.Tensor) -> torch.dtype:
        return self.dtype if parameter.is_floating_point() else parameter.dtype

    def _sent(self, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Sends the first worker's values of a tensor to all workers' devices. Returns this worker's copy."""
        if dist.get_rank() == 0:
            values = self.values.pop(id(tensor), partial(_same, tensor))().to(self.device, dtype).contiguous()
        else:
            values = torch.empty(shape, dtype=dtype, device=self.device)
        if dist.get_world_size() > 1:
            dist.broadcast(values.reshape(-1).view(torch.uint8), 0)
        return values


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _copied(recipe: Recipe) -> Recipe:
    """Copies a recipe, and the lists, sets, and dicts in its attributes, because a `build` may add to them."""
    copied = copy.copy(recipe)
    for name, value in vars(recipe).items():
        if type(value) in (list, dict, set):
            setattr(copied, name, copy.copy(value))
    return copied


def _device() -> torch.device:
    """Returns the device that DeepSpeed uses for this worker's model."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())
