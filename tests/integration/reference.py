"""Computes the reference for the engine: the same job in one plain PyTorch process, without Ray and DeepSpeed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from heliostat.config.schedules import factor
from heliostat.data.dataset import open_dataset
from heliostat.recipes import building
from heliostat.validation import check


def plain_losses(path: Path, settings: list[str]) -> list[float]:
    """Returns the losses of every step: in fp32, with the whole global batch at once, torch's clipping and mean, and its AdamW if
    the job has that."""
    checked = check.check(check.load_job(path, settings))
    job, recipe = checked.job, checked.recipe
    dataset = open_dataset(checked.plan)
    torch.manual_seed(job.train.seed)
    model = recipe.build()
    settings_ = job.train.optimizer
    optimizer = _adamw(model, settings_) if settings_.name == "adamw" else _named(model, job, recipe)
    losses = []
    for step in range(job.train.steps):
        content = dataset.read(dataset.order.locate(dataset.order.step(step).ravel()))
        keys = step * job.train.global_batch_size + np.arange(job.train.global_batch_size)
        batch = recipe.batch(content, keys)
        for group in optimizer.param_groups:
            group["lr"] = settings_.lr * factor(job.train.schedule, step, job.train.steps)
        computed = recipe.loss(model, batch)
        loss = computed.sum / recipe.terms(batch)
        (loss + sum(part.weight * part.value for part in computed.parts.values() if part.weight)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _adamw(model: torch.nn.Module, settings: Any) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
    )


def _named(model: torch.nn.Module, job: Any, recipe: Any) -> torch.optim.Optimizer:
    """Creates the optimizer of a job, over whole parameters."""
    settings = job.train.optimizer
    groups = building.parameter_groups(model, settings.weight_decay, recipe, settings.orthogonalizes)
    return settings.build([{**group, "warmup": job.train.schedule.warmup_steps} for group in groups])
