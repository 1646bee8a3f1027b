"""Compares the held-out loss of small U-Nets and PixArts with their authors' initial weights, and with torch's default ones.

    heliostat data prepare pipelines/quickstart-images.yaml && OMP_NUM_THREADS=1 python -m tests.benchmarks.image_init [--steps
    600]

Model, samples, loss, schedule, and average are those of `jobs/quickstart-diffusion.yaml`, in a plain loop of one process, without
Ray and ZeRO. PixArt replaces the U-Net with its own backbone and a lower rate. The two starts of a seed differ only in the
backbone's first weights: text encoder, samples, noise, and timesteps are the same.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from statistics import mean
from typing import Any

import numpy as np
import torch
from heliostat.config import schedules
from heliostat.data.dataset import open_dataset
from heliostat.validation import check

from tests.benchmarks import harness

JOB = harness.ROOT / "jobs/quickstart-diffusion.yaml"
RATES = {"unet": 2e-3, "pixart": 1e-3}
PIXART = {"arch": "pixart", "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16, "patch_size": 2}
STARTS = ("authors'", "torch's default")
HELD_OUT = 128


def settings(arch: str, steps: int, batch: int, seed: int) -> list[str]:
    """Returns the settings that differ from the quickstart's job."""
    backbone = [f"model.backbone={PIXART}"] if arch == "pixart" else []
    return [*backbone, f"train.optimizer.lr={RATES[arch]}", f"train.steps={steps}", f"train.global_batch_size={batch}",
            f"train.micro_batch_size={batch // 4}", f"train.seed={seed}", f"data.seed={seed}", "evaluate.every=100",
            f"evaluate.samples={HELD_OUT}", "model.samples={}", "mlflow.register=null"]  # fmt: skip


def begin(recipe: Any, start: str, seed: int) -> Any:
    """Builds the model of a seed; with `torch's default`, the backbone has its class's weights for the same configuration."""
    torch.manual_seed(seed)
    model = recipe.build()
    if start != STARTS[0]:
        torch.manual_seed(seed)
        backbone = getattr(model, recipe.parts.name)
        setattr(model, recipe.parts.name, type(backbone).from_config(backbone.config))
    return model


def held_out_loss(checked: Any, dataset: Any, model: Any) -> float:
    samples = dataset.order.held_out(HELD_OUT)
    batch = checked.recipe.batch(dataset.read(samples), np.arange(len(samples)))
    with torch.no_grad():
        return float(checked.recipe.evaluate(model, batch)["loss"].mean())


def losses(checked: Any, start: str, marks: int) -> Iterator[float]:
    """Trains; yields the average's held-out loss `marks` times, the last time after the last step."""
    dataset = open_dataset(checked.plan)
    for average in averages(checked, begin(checked.recipe, start, checked.job.train.seed), dataset, marks):
        yield held_out_loss(checked, dataset, average)


def averages(checked: Any, model: Any, dataset: Any, marks: int) -> Iterator[Any]:
    """Trains; yields the average of the weights `marks` times, the last time after the last step."""
    recipe, train, given = checked.recipe, checked.job.train, checked.job.train.optimizer
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), given.lr, given.betas, weight_decay=given.weight_decay)
    for step in range(train.steps):
        for group in optimizer.param_groups:
            group["lr"] = given.lr * schedules.factor(train.schedule, step, train.steps)
        samples = dataset.order.step(step).ravel()
        batch = recipe.batch(
            dataset.read(dataset.order.locate(samples)), step * train.global_batch_size + np.arange(len(samples))
        )
        loss = recipe.loss(model, batch)
        sum((part.weight * part.value for part in loss.parts.values()), loss.sum / len(samples)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        rate = 1 - min(train.ema.decay, (2 + step) / (11 + step))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], rate)
        if (step + 1) % (train.steps // marks) == 0:
            yield average


def main() -> None:
    options = harness.arguments(__doc__, steps=600, batch=32, seeds=[1, 2, 3], backbones=[*RATES])
    torch.set_num_threads(1)
    marks = 3
    steps = [options.steps * (i + 1) // marks for i in range(marks)]
    print(f"{options.batch} images a step; held-out loss of {HELD_OUT} images, averaged weights")
    harness.head("backbone", "seed", "start", *(f"step {s}" for s in steps), "seconds")
    for arch in options.backbones:
        found: dict[str, list[list[float]]] = {start: [] for start in STARTS}
        for seed in options.seeds:
            checked = check.check(check.load_job(JOB, settings(arch, options.steps, options.batch, seed)))
            for start in STARTS:
                began = time.perf_counter()
                curve = list(losses(checked, start, marks))
                found[start].append(curve)
                harness.row(arch, seed, start, *(f"{value:.4f}" for value in curve), f"{time.perf_counter() - began:.0f}")
        for start, curves in found.items():
            harness.row(arch, "mean", start, *(f"{mean(c):.4f}" for c in zip(*curves, strict=True)), "")
        ratios = [[math.log(a / b) for a, b in zip(*pair, strict=True)] for pair in zip(*found.values(), strict=True)]
        cells = (f"{math.exp(mean(r)):.3f} ({math.exp(min(r)):.3f} to {math.exp(max(r)):.3f})" for r in zip(*ratios, strict=True))
        harness.row(arch, "ratio (minimum to maximum)", "authors' / default", *cells, "")


if __name__ == "__main__":
    main()
