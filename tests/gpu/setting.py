"""Sets up one process as a run's only worker: a job, its engine, and random tokens to train on."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.unit.build_job import job as build_job

TINY = {"arch": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 256}  # fmt: skip
GPU = torch.cuda.is_available()
TWIN = GPU and not torch.backends.cuda.is_built()  # `tests.twin` stands for the GPU
DEVICE = torch.device("cuda" if GPU else "cpu")
BACKEND = "nccl" if GPU and not TWIN else "gloo"


def start() -> Any:
    """Joins a process group of one process, and a gloo group, and prepares DeepSpeed."""
    from heliostat.engine import deepspeed_engine

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    where = tempfile.mkdtemp()
    dist.init_process_group(BACKEND, init_method=f"file://{where}/group", rank=0, world_size=1)
    deepspeed_engine.prepare_environment(float(GPU))
    return dist.new_group(backend="gloo")


def job(model: dict[str, Any], length: int = 64, micro: int = 2, batch: int = 4, **changes: Any) -> Any:
    """Returns a job of one worker on this device, with a learning rate at which a tiny model learns within a few steps."""
    base = {"model": model, "data.sequence_length": length, "workers": {"count": 1, "gpus": int(GPU)}, "train.steps": 1000}
    base |= {
        "train.global_batch_size": batch,
        "train.micro_batch_size": micro,
        "train.optimizer.lr": 3e-3,
        "train.precision": "fp32",
    }
    return build_job(**(base | {key: value for key, value in changes.items() if value is not None}))


def recipe(made: Any, **attributes: Any) -> Any:
    """Returns the recipe of a job. `attributes`: those that the job can't set, such as a kernel that jobs on CPUs may not
    name."""
    from heliostat.recipes import CausalLM

    found = CausalLM(made)
    found.end = 1  # the token that ends documents
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def engine(made: Any, its: Any) -> Any:
    from heliostat.engine import deepspeed_engine

    return deepspeed_engine.build_engine(made, its)


def micros(made: Any, its: Any, step: int) -> list[Any]:
    """Returns a step's micro-batches, on the CPU."""
    train, size = made.train, made.model["vocab_size"]
    tokens = np.random.default_rng(step).zipf(1.3, (train.global_batch_size, made.data.sequence_length)) % size
    parts = np.split(tokens.astype(np.int32), train.global_batch_size // train.micro_batch_size)
    return [its.batch(part, np.arange(len(part))) for part in parts]


def losses(made: Any, its: Any, on: Any, first: int, steps: int) -> list[float]:
    """Trains an engine for steps [first, first + steps); returns each step's loss."""
    from heliostat.data.device_streams import on_device

    found = []
    for step in range(first, first + steps):
        total, parts = torch.zeros((), device=DEVICE), micros(made, its, step)
        for micro, batch in zip(parts, on_device(parts, DEVICE), strict=True):
            loss = its.loss(on, batch).sum / its.terms(micro)
            on.backward(loss)
            total += loss.detach().float() / len(parts)
            on.step()
        found.append(float(total))
    return found


def plain(made: Any, its: Any, steps: int) -> list[float]:
    """Computes the CPU reference: one plain process of torch in fp32, with a step's batch summed from its micro-batches."""
    from heliostat.recipes import building

    settings = made.train.optimizer
    torch.manual_seed(made.train.seed)
    model = building.build(its)
    groups = building.parameter_groups(model, settings.weight_decay, its, settings.orthogonalizes)
    optimizer = settings.build([{**group, "warmup": made.train.schedule.warmup_steps} for group in groups])
    found = []
    for step in range(steps):
        parts = micros(made, its, step)
        total = 0.0
        for micro in parts:
            loss = its.loss(model, micro).sum / its.terms(micro) / len(parts)
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), made.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found
