"""What the engine is measured against: the same job in one plain PyTorch process, with nothing of Ray or DeepSpeed."""

from pathlib import Path

import numpy as np
import torch
from heliostat import check
from heliostat.data.dataset import open_dataset
from heliostat.train.worker.lr_schedule import factor


def plain_losses(path: Path, settings: list[str]) -> list[float]:
    """Losses of every step, fp32, the whole global batch at once, torch's own AdamW, clipping and mean."""
    checked = check.check(check.load_job(path, settings))
    job, recipe = checked.job, checked.recipe
    dataset = open_dataset(checked.plan)
    torch.manual_seed(job.train.seed)
    model = recipe.build()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    settings_ = job.train.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings_.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings_.lr,
        betas=(settings_.betas[0], settings_.betas[1]),
        eps=settings_.eps,
    )
    losses = []
    for step in range(job.train.steps):
        content = dataset.read(dataset.order.locate(dataset.order.step(step).ravel()))
        keys = step * job.train.global_batch + np.arange(job.train.global_batch)
        batch = recipe.batch(content, keys)
        for group in optimizer.param_groups:
            group["lr"] = settings_.lr * factor(job.train.schedule, step, job.train.steps)
        loss = recipe.loss(model, batch).sum / recipe.terms(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
