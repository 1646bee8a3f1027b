"""Compares the CPU seconds of a training step of heliostat's engine with those of a plain loop of diffusers and accelerate.

    heliostat data prepare pipelines/quickstart-images.yaml --set resolution=32 --set output=FOLDER
    OMP_NUM_THREADS=1 python -m tests.benchmarks.diffusion_steps FOLDER [--stage 1] [--precision fp32] [--steps 12] [--batch 16]

Both train the U-Net of `diffusion.py` in one process of one thread, and take turns after each step. So other programs, which
change the speed of a shared machine, slow both. heliostat's step includes decoding images and tokenizing captions; the plain loop
has both in memory. Ray, MLflow, and the second worker are left out (see `diffusion.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from heliostat.data.dataset import Dataset, open_dataset
from heliostat.engine import deepspeed_engine, ema
from heliostat.recipes.images import rows
from heliostat.recipes.images.pipeline import tokenize
from heliostat.validation import check

from tests.benchmarks import diffusion, harness
from tests.gpu import setting

WARM = 3  # steps that aren't counted


def checked(data: Path, options: Any) -> Any:
    settings = {
        "data.path": data, "data.virtual_ranks": 1, "workers.count": 1, "mlflow.register": "null", "model.samples": {},
        "train.zero.stage": options.stage, "train.precision": options.precision, "train.global_batch_size": options.batch,
        "train.micro_batch_size": options.batch // 2, **{f"model.backbone.{k}": v for k, v in diffusion.CHANNELS.items()},
    }  # fmt: skip
    keys = [f"{key}={value}" for key, value in settings.items()]
    return check.check(check.load_job(harness.ROOT / "jobs/quickstart-diffusion.yaml", keys))


def ours(made: Any, dataset: Dataset) -> Iterator[None]:
    """Trains with heliostat's engine; yields after each step."""
    job, recipe = made.job, made.recipe
    engine = deepspeed_engine.build_engine(job, recipe)
    average, size = ema.of(job, engine), job.train.micro_batch_size
    for step in range(job.train.steps):
        samples = dataset.order.step(step).ravel()
        content = dataset.read(dataset.order.locate(samples))
        deepspeed_engine.set_lr(engine, job.train.lr(step))
        for first in range(0, len(samples), size):
            keys = step * len(samples) + np.arange(first, first + size)
            loss = recipe.loss(engine, recipe.batch(content.slice(first, size), keys))
            engine.backward(loss.sum / size)
            engine.step()
        deepspeed_engine.gradient_norm(engine, job.train.grad_clip)
        assert average
        average.update(step + 1)
        yield


def plain(made: Any, dataset: Dataset) -> Iterator[None]:
    """Trains with the loop of diffusers' examples; yields after each step."""
    job, recipe = made.job, made.recipe
    accelerator = Accelerator(cpu=True, mixed_precision="no" if job.train.precision == "fp32" else job.train.precision)
    model, scheduler = recipe.build(), recipe.process.scheduler("ddpm")
    average = EMAModel(model.parameters(), decay=job.train.ema.decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.optimizer.lr, fused=True)
    content = dataset.read(dataset.order.locate(dataset.order.step(0).ravel()))
    clean, text = rows.pixels(content), tokenize(recipe.parts.tokenizers[0], content["caption"].to_pylist()).input_ids
    empty, size = recipe.parts.empty["text"], job.train.micro_batch_size
    model, optimizer = accelerator.prepare(model, optimizer)
    while True:
        for image, ids in zip(clean.split(size), text.split(size), strict=True):
            noise = torch.randn_like(image)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(image),))
            ids = torch.where(torch.rand(len(image), 1) < recipe.model.caption_dropout, empty, ids)
            predicted = model(scheduler.add_noise(image, noise, t), t, ids)
            loss = F.mse_loss(predicted.float(), scheduler.get_velocity(image, noise, t))
            accelerator.backward(loss * size / len(clean))
        accelerator.clip_grad_norm_(model.parameters(), job.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        yield


def seconds(loops: dict[str, Iterator[None]], steps: int) -> dict[str, list[float]]:
    """Takes a step of each loop after another. Returns the CPU seconds of each step."""
    spent: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(WARM + steps):
        for name, loop in loops.items():
            began = time.process_time()
            next(loop)
            spent[name].append(time.process_time() - began)
    return {name: one[WARM:] for name, one in spent.items()}


def main() -> None:
    options = harness.arguments(__doc__, data=Path, stage=1, precision="fp32", steps=12, batch=16)
    torch.set_num_threads(1)
    setting.start()
    made = checked(options.data, options)
    dataset = open_dataset(made.plan)
    found = seconds({"ours": ours(made, dataset), "plain": plain(made, dataset)}, options.steps)
    harness.head("case", "heliostat, CPU s per step", "plain loop, CPU s per step", "ratio of the speeds", "steps")
    ratios = [b / a for a, b in zip(found["ours"], found["plain"], strict=True)]
    harness.row(f"ZeRO-{options.stage}, {options.precision}", *(harness.spread(one) for one in found.values()),
                harness.spread(ratios), options.steps)  # fmt: skip


if __name__ == "__main__":
    main()
