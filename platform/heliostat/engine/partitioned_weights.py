"""Gives a model its initial weights at ZeRO stage 3, where no worker ever has all weights.

Constructors partition each parameter among the workers. If the weights come from a pretrained folder, the first worker then reads
one tensor at a time (`recipes.folder_weights`), and each worker keeps its part of it. If a folder can't be read tensor by tensor,
the library loads it, and the first worker's host memory has the complete model for a while. heliostat logs a warning.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from heliostat.checkpoint.agreement import first
from heliostat.config.spec import Job
from heliostat.recipes import building, folder_weights, partitioning, weightless
from heliostat.recipes.protocol import Recipe

log = logging.getLogger(__name__)


def build(job: Job, recipe: Recipe, streams: bool = True) -> torch.nn.Module:
    """Builds the model inside the context `partitioning.by`. Collective.

    `streams`: whether the first worker's values reach all workers. They don't if several groups of workers each have all weights.
    """
    torch.manual_seed(job.train.seed)
    if not streams or not dist.is_initialized():
        return building.build(recipe)
    with weightless.noting() as noted:
        model = building.build(recipe)
    if not noted:
        return model
    stored: dict[int, folder_weights.Stored | folder_weights.ComputedWeight] = {}

    def find() -> str:
        try:
            stored.update(folder_weights.find(model, noted))
        except folder_weights.UnreadableError as e:
            return str(e)
        return ""

    group = dist.new_group(backend="gloo")
    why = first(group, find)
    if why:
        log.warning("model: the first worker loads all weights at once, because it can't load them tensor by tensor (%s)", why)
        del model
        torch.manual_seed(job.train.seed)
        model = building.build(recipe)
    else:
        _read(model, stored, group)
    dist.destroy_process_group(group)
    return model


@torch.no_grad()
def _read(
    model: torch.nn.Module, stored: dict[int, folder_weights.Stored | folder_weights.ComputedWeight], group: dist.ProcessGroup
) -> None:
    """Sets all parameters, and the buffers that the folders have, to the stored values."""
    reads = dist.get_rank() == 0
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):  # small: the library of the adapter doesn't partition its matrices
            parameter.copy_(_sent(parameter, stored, group))
            continue
        with partitioning.whole(parameter):
            if reads:
                parameter.copy_(stored[id(parameter)].read())
    for name, buffer in model.named_buffers():
        has = [id(buffer) in stored]
        dist.broadcast_object_list(has, 0, group=group)
        if has[0]:
            building.put_buffer(model, name, _sent(buffer, stored, group).to(buffer.device))


def _sent(
    tensor: torch.Tensor, stored: dict[int, folder_weights.Stored | folder_weights.ComputedWeight], group: dist.ProcessGroup
) -> torch.Tensor:
    """Sends the stored values of a tensor from the first worker to all. Returns them in the tensor's type, on the host."""
    if dist.get_rank() == 0:
        values = stored[id(tensor)].read().to(tensor.dtype).contiguous()
    else:
        values = torch.empty_like(tensor, device="cpu")
    dist.broadcast(values.reshape(-1).view(torch.uint8), 0, group=group)
    return values
