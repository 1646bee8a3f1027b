"""Compares the terms of text-to-image losses: trains a small model with one key changed, and measures its held-out error.

    heliostat data prepare pipelines/quickstart-images.yaml
    OMP_NUM_THREADS=1 python -m tests.benchmarks.image_terms [--job FILE] [--dataset FOLDER] [--steps 600] [--seeds 1 2 3]

Every variant is flow matching in a plain loop of one process. The error is that of the velocity on held-out images, with the same
noise and uniform times for every variant. So it compares variants whose losses have different weights. Terms that change the
coupling of images and noise (near noise) learn other velocities, so their error is no measure of their images: compare scores of
images. The seconds are CPU seconds per step.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from heliostat.data.dataset import open_dataset
from heliostat.validation import check

from tests.benchmarks import harness, image_init

GOLDEN = 0.6180339887498949
VARIANTS: dict[str, list[str]] = {
    "flow": [],
    "x": ["model.objective.prediction=x"],
    "logit-normal": ["model.objective.timesteps=logit_normal"],
    "logit-normal, mean 0.5": ["model.objective.timesteps=logit_normal", "model.objective.timestep_mean=0.5"],
    "shift 2": ["model.objective.shift=2.0"],
    "min-SNR 5": ["model.objective.min_snr=5.0"],
    "contrastive": ["model.contrastive={weight: 0.05}"],
    "near noise, 4 candidates": ["model.immiscible={candidates: 4}"],
    "near noise, groups of 8": ["model.immiscible={group: 8}"],
}


def checked(options: Any, variant: str, seed: int) -> Any:
    train = {"steps": options.steps, "global_batch_size": options.batch, "micro_batch_size": options.batch // 4, "seed": seed}
    usual = [f"train.{name}={value}" for name, value in train.items()] + [
        f"data.seed={seed}",
        "model.objective={prediction: flow}",
    ]
    usual += [
        f"train.schedule.warmup_steps={options.steps // 20}",
        "evaluate.every=100",
        f"evaluate.samples={options.held_out}",
        "model.samples={}",
        "mlflow.register=null",
    ]
    usual += [f"data.path={options.dataset}"] if options.dataset else []
    return check.check(check.load_job(options.job, usual + VARIANTS[variant]))


def velocity_error(made: Any, usual: Any, dataset: Any, model: Any, count: int) -> float:
    """Computes the mean squared error of the velocity. `made`: the variant. `usual`: the variant without changes, whose noise and
    captions are used."""
    samples = dataset.order.held_out(count)
    batch = usual.recipe._completed(usual.recipe.batch(dataset.read(samples), np.arange(len(samples))), training=False)
    t = torch.remainder((batch["key"] + 0.5) * GOLDEN, 1.0).float()
    process, image, noise = made.recipe.process, batch["image"], batch["noise"]
    noisy = process.noisy(image, noise, t)
    with torch.no_grad():
        velocity = process.velocity(model(noisy, process.network_time(t), batch["caption"]), noisy, t)
    return float((velocity - (noise - image)).square().mean())


def main() -> None:
    options = harness.arguments(__doc__, job={"type": Path, "default": image_init.JOB}, dataset="", steps=600, batch=32,
                                held_out=128, seeds=[1, 2, 3], variants=[*VARIANTS])  # fmt: skip
    torch.set_num_threads(1)
    errors: dict[str, list[float]] = {name: [] for name in options.variants}
    seconds: dict[str, list[float]] = {name: [] for name in options.variants}
    for seed in options.seeds:
        usual = checked(options, "flow", seed)
        for name in options.variants:  # interleaved, because a busy machine slows all of them
            made = checked(options, name, seed)
            dataset, model = open_dataset(made.plan), image_init.begin(made.recipe, image_init.STARTS[0], seed)
            began = time.process_time()
            (average,) = image_init.averages(made, model, dataset, 1)
            seconds[name].append((time.process_time() - began) / options.steps)
            errors[name].append(velocity_error(made, usual, dataset, average, options.held_out))
    print(f"{options.batch} images per step, {options.steps} steps, seeds {options.seeds}; averaged weights")
    harness.head("variant", "error of the velocity", "ratio to the first", "CPU seconds per step")
    first = options.variants[0]
    for name in options.variants:
        ratios = [mine / other for mine, other in zip(errors[name], errors[first], strict=True)]
        harness.row(name, harness.spread(errors[name], ".4f"), harness.spread(ratios), f"{mean(seconds[name]):.3f}")


if __name__ == "__main__":
    main()
