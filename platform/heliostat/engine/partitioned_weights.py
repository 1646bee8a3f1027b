"""Reads a pretrained model into the workers' parts at ZeRO stage 3, where no worker ever has all weights.

Workers build the model without weights (`recipes.weightless`). Then the first worker reads one tensor at a time
(`recipes.folder_weights`), and DeepSpeed sends each worker its part. Buffers have the values that the constructor computes
outside of `deepspeed.zero.Init`, which would round them to the precision of training at each operation.

With shard groups (`train.zero.shard_group_size`), the first worker of each group reads.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.distributed as dist

from heliostat.checkpoint.agreement import first, together
from heliostat.config.spec import Job
from heliostat.engine import zero_state
from heliostat.engine.first_weights import DTYPES
from heliostat.recipes import building, folder_weights, weightless
from heliostat.recipes.protocol import Recipe

Values = dict[int, folder_weights.Stored | folder_weights.ComputedWeight]  # by the `id`s of the model's tensors

log = logging.getLogger(__name__)


def read(job: Job, recipe: Recipe, config: dict[str, Any], within: dist.ProcessGroup | None) -> torch.nn.Module | None:
    """Builds a model with the weights of its folders, and partitions it. Collective.

    Returns None if the recipe itself must build the model with weights: its weights don't come from folders, heliostat can't read
    the folders tensor by tensor (logs a warning), or `build` isn't heliostat's, because such a `build` may change the weights.

    `config`: DeepSpeed's config. `within`: the workers of this worker's shard group; None means all workers.
    """
    if not dist.is_initialized() or not type(recipe).build.__module__.startswith("heliostat."):
        return None
    torch.manual_seed(job.train.seed)
    with weightless.building() as noted:
        model = building.build(recipe)
    if not any(isinstance(one, weightless.Pretrained) for one in noted):
        return None
    reads, stored = dist.get_rank(within) == 0, Values()

    def find() -> str:
        try:
            stored.update(folder_weights.find(model, noted) if reads else {})
        except folder_weights.UnreadableError as e:
            return str(e)
        return ""

    group = dist.new_group(backend="gloo")
    if why := next(filter(None, together(group, find)), None):
        if dist.get_rank() == 0:
            log.warning(
                "model: each worker loads all weights at once, because the first worker can't load them tensor by tensor. This "
                "needs %.1f GB of host memory per worker (%s)",
                4 * sum(p.numel() for p in model.parameters()) / 1e9,  # in fp32
                why,
            )
    else:
        _partition(model, stored, reads, DTYPES[job.train.precision], config)
        _set_buffers(model, stored, DTYPES[job.train.precision], group)
    dist.destroy_process_group(group)
    return None if why else model


def _partition(model: torch.nn.Module, stored: Values, reads: bool, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Gives the parameters, which have no memory yet, their values one by one, and partitions each."""
    from deepspeed import zero

    partitioner = zero.Init(module=torch.nn.Module(), config_dict_or_path=copy.deepcopy(config))
    for p in model.parameters():
        own = dtype if p.is_floating_point() else p.dtype
        values = stored[id(p)].read().to(own) if reads else torch.empty(p.shape, dtype=own)
        weightless.put(p, values.to(partitioner.local_device).contiguous())
        zero_state.partition(partitioner, p)


def _set_buffers(model: torch.nn.Module, stored: Values, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
    """Sets the buffers that the folders have to the stored values, and moves all buffers to the device of training.

    Buffers get the precision of training, as below stage 3. Models of transformers choose the precision of their buffers
    themselves, and compute rotary positions in fp32.
    """
    from deepspeed.accelerator import get_accelerator
    from transformers import PreTrainedModel

    chosen = {id(buffer) for m in model.modules() if isinstance(m, PreTrainedModel) for buffer in m.buffers()}
    device, buffers = get_accelerator().current_device_name(), dict(model.named_buffers(remove_duplicate=False))
    in_folders = set(first(group, lambda: [name for name, buffer in buffers.items() if id(buffer) in stored]))
    sent: dict[int, torch.Tensor] = {}  # a buffer that several modules share stays shared
    for name, buffer in buffers.items():
        if id(buffer) not in sent:
            values = buffer
            if name in in_folders:
                values = stored[id(buffer)].read().to(buffer.dtype) if dist.get_rank() == 0 else torch.empty_like(buffer)
                dist.broadcast(values, 0, group=group)
            own = dtype if buffer.is_floating_point() and id(buffer) not in chosen else buffer.dtype
            sent[id(buffer)] = values.to(device, own)
        building.put_buffer(model, name, sent[id(buffer)])
