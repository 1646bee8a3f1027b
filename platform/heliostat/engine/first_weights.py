"""Makes a model's initial weights once in a run's workers, below ZeRO stage 3, where each of them has all weights.

The first worker sends its weights to the others, one at a time, in the precision that trains, from device to device. The others
build the model without weights of their own (`recipes.weightless`). In host memory are the weights of one worker in fp32, and
only until they are sent, rather than those of every one on a node (8 x 32 GB with 8 GPUs and 8 billion parameters).

All build their own where that can't be: with `train.parallel.tensor`, whose workers have other parts of each matrix, and in
recipes of one's own, whose `build` may read the weights.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from heliostat.checkpoint.agreement import agreed
from heliostat.config.spec import Job
from heliostat.recipes import building, weightless
from heliostat.recipes.protocol import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(job: Job, recipe: Recipe) -> torch.nn.Module:
    """Builds the model with its initial weights, the same on every worker; collective."""
    ours = type(recipe).build.__module__.startswith("heliostat.")
    if not dist.is_initialized() or dist.get_world_size() == 1 or job.train.parallel.tensor > 1 or not ours:
        return building.build(recipe)
    device, dtype = _device(job), DTYPES[job.train.precision]
    model = agreed(dist.new_group(backend="gloo"), lambda: _built(recipe, device, dtype))
    for p in model.parameters():
        p.data = _sent(p.detach().to(device, dtype if p.is_floating_point() else None))
    for name, buffer in list(model.named_buffers()):  # a pretrained model's may hold what its architecture does not say
        building.put_buffer(model, name, _sent(buffer.detach().to(device)))
    return model


def _built(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    if dist.get_rank() == 0:
        return building.build(recipe)
    with weightless.building():
        model = building.build(recipe)
    weightless.materialize(model, device, dtype)
    return model


def _sent(tensor: torch.Tensor) -> torch.Tensor:
    """Sends the first worker's tensor, on the device that trains, to all others; returns what arrived."""
    tensor = tensor.contiguous()
    dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
    return tensor


def _device(job: Job) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if job.workers.gpus else torch.device("cpu")
