"""Tests token routing and alignment on real engines: on any number of workers, at any ZeRO stage, and in any micro-batches, the
training is the plain loop's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset, plan
from heliostat.engine import deepspeed_engine
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location
from heliostat.training.worker.objective import Objective

from tests.integration import ranks
from tests.unit import build_aids, build_images
from tests.unit.build_job import job

STEPS, BATCH = 3, 8
AIDS: dict[str, dict[str, Any]] = {
    "pixart": {"repa": {"layer": 1, "weight": 0.5, "width": 16, "until_step": 2}, "tread": {"from": 2, "to": 3}},
    "unet": {"repa": {"layer": 3, "weight": 0.5, "width": 16}},
}
LAYOUTS = [(stage, micro) for stage in (2, 3) for micro in (2, 4)]


def made(dataset: str, arch: str, stage: int, micro: int, workers: int, checkpointing: bool) -> tuple[Any, TextToImage]:
    changes = {"train.zero.stage": stage, "train.global_batch_size": BATCH, "train.micro_batch_size": micro,
               "workers.count": workers, "data.virtual_ranks": 2,  # the same samples in any micro-batches
               "train.optimizer": {"name": "adamw", "lr": 1e-2}, "train.grad_clip": 0,
               "train.activation_checkpointing": checkpointing,
               "train.deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}  # fmt: skip
    one = job(**{**build_images.job(Path(dataset), backbone=build_aids.DEEP[arch], **AIDS[arch]), **changes})
    recipe = TextToImage(one)
    recipe.bind([manifest.read(Location(dataset))])
    return one, recipe


def batches(dataset: str, recipe: TextToImage, one: Any, step: int, places: np.ndarray) -> Any:
    data = open_dataset(plan(one, [manifest.read(Location(dataset))]))
    return recipe.batch(data.read(data.order.locate(data.order.step(step).ravel()[places])), step * BATCH + places)


def trained(group: Any, everyone: Any, dataset: str) -> Iterator[dict[str, Any]]:
    """In every rank, trains a few steps in each configuration. Yields the losses and similarities of each step."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for arch in AIDS:
        for number, (stage, micro) in enumerate(LAYOUTS):
            one, recipe = made(dataset, arch, stage, micro, world, checkpointing=number % 2 == 0)
            engine = deepspeed_engine.build_engine(one, recipe)
            objective, curve = Objective(recipe), []
            for step in range(STEPS):
                mine = np.arange(BATCH).reshape(world, -1, micro)[rank]
                total = torch.zeros(2)
                for places in mine:
                    share = objective.part(engine, batches(dataset, recipe, one, step, places), BATCH // micro, BATCH)
                    engine.backward(share.objective)
                    engine.step()
                    total += torch.stack([share.loss / BATCH, share.added[0]])
                dist.all_reduce(total)
                curve.append(total.tolist())
            yield {"arch": arch, "layout": [stage, micro], "curve": curve}
            deepspeed_engine.destroy_engines()


def plain(dataset: str, arch: str) -> list[list[float]]:
    """Trains the same steps in one process with torch alone, on the whole batch at once."""
    one, recipe = made(dataset, arch, 2, BATCH // 2, 1, checkpointing=False)
    torch.manual_seed(one.train.seed)
    model, curve = recipe.build(), []
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    decay = one.train.optimizer.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (one.train.optimizer.betas[0], one.train.optimizer.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=betas, eps=one.train.optimizer.eps)
    for step in range(STEPS):
        loss = recipe.loss(model, batches(dataset, recipe, one, step, np.arange(BATCH)))
        part = loss.parts["repa"]
        optimizer.zero_grad()
        (loss.sum / BATCH + part.weight * part.value).backward()
        optimizer.step()
        curve.append([float(loss.sum) / BATCH, float(part.value)])
    return curve


@pytest.mark.ci
def test_routed_and_aligned_training_is_the_plain_loops_on_any_workers_stage_and_micro_batch(tmp_path: Path) -> None:
    dataset = str(build_aids.featured(tmp_path, "int8"))
    rows = ranks.run(f"{__name__}:trained", (1, 2), dataset)
    assert len(rows) == 3 * len(LAYOUTS) * len(AIDS)
    for arch in AIDS:
        expected = np.array(plain(dataset, arch))
        assert np.ptp(expected[:, 0]) > 1e-2 and np.ptp(expected[:, 1]) > 1e-3, "training changes both"
        for row in (row for row in rows if row["arch"] == arch):
            assert np.array(row["curve"]) == pytest.approx(expected, abs=2e-4), (row["workers"], row["layout"])
