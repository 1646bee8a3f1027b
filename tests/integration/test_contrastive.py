"""Tests that the contrastive loss and its gradients are those of the global batch.

On 1, 2, and 4 workers and at every ZeRO stage, they equal plain autograd over all pairs at once in one process.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.data.dataset import open_dataset, plan
from heliostat.data.manifest import read
from heliostat.numerics import play
from heliostat.recipes import building
from heliostat.recipes.loading import load
from heliostat.training.worker import coupled
from heliostat.training.worker.micro_batches import BatchPlan

from tests.golden.curves import Steps
from tests.integration import ranks
from tests.unit import build_images, build_pairs


class Case(NamedTuple):
    """Describes the embedded data and the ZeRO stage: texts with a pooling, or images and their captions. `block`: the workers
    share the loss, over so many samples at a time."""

    of: str
    stage: int
    pooling: str = ""
    block: int = 0

    def job(self, folder: Path, workers: int) -> Job:
        changes: dict[str, Any] = {"train.zero.stage": self.stage, "workers.count": workers}
        changes["train.deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        if self.of == "texts":
            return build_pairs.embedder(folder / "texts", **changes, **{"model.pooling": self.pooling})
        return build_images.embedder(folder / "images", **changes)


CASES = {  # by workers
    1: [Case("texts", 0, "mean"), Case("images", 0), Case("texts", 1, "mean", 3)],
    2: [Case("texts", 1, "mean"), Case("texts", 2, "last"), Case("texts", 3, "cls"), Case("images", 1)],
    4: [Case("texts", 3, "mean"), Case("images", 2), Case("images", 3), Case("texts", 2, "mean", 1)],
}
Named = dict[str, torch.Tensor]


def played(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In every rank, yields the distance of the worker's step from the plain one, in each case."""
    for case in CASES[dist.get_world_size()]:
        job = case.job(Path(folder), dist.get_world_size())
        coupled.SHARED_FROM = case.block or 1024
        data_plan = plan(job, [read(location) for location in job.sources])
        steps = Steps(job, data_plan)
        computed = list[Named]()
        play.watch(steps.engine, computed.append)
        steps.step(0, steps.prepare(0, steps.dealt().next_step()))
        sums = torch.stack([steps.losses[0], *steps.added[0]]).double()
        dist.all_reduce(sums)
        if dist.get_rank() == 0:
            (kept,), (loss, parts, right) = computed, plain(job, data_plan)
            off = max(float((kept[name] - g).norm() / right["all"].norm()) for name, g in right.items() if name != "all")
            yield {"case": case, "loss": loss, "parts": parts, "told": sums.tolist(), "off": off,
                   "gradients": sorted(kept), "named": sorted(set(right) - {"all"})}  # fmt: skip


def plain(job: Job, data_plan: Any) -> tuple[float, list[float], Named]:
    """Returns the loss of the first step, its parts, and its gradients, with `all` of them end to end: one graph over all
    pairs."""
    dataset, batches, micro = open_dataset(data_plan), BatchPlan(job, data_plan), job.train.micro_batch_size
    recipe = load(job, dataset.sources)
    torch.manual_seed(job.train.seed)
    model = building.build(recipe)
    content = dataset.load(dataset.order.step(0).ravel(), True).content
    keys = np.arange(job.train.global_batch_size)
    found = []
    for i, start in enumerate(range(0, len(keys), micro)):
        torch.manual_seed(batches.seed(0, range(data_plan.shape.lanes), i))
        batch = recipe.batch(content.slice(start, micro), keys[start : start + micro])
        found.append(recipe.represent(model, batch))
    made = recipe.couple({name: torch.cat([one[name] for one in found]) for name in found[0]})
    (made.sum / len(keys)).backward()
    right = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    parts = [float(part.value) for part in made.parts.values()]
    return float(made.sum.detach()) / len(keys), parts, {**right, "all": torch.cat([g.flatten() for g in right.values()])}


def test_loss_and_gradients_are_one_processs_on_any_workers_and_stage(tmp_path) -> None:
    build_pairs.dataset(tmp_path / "texts")
    build_images.digits(tmp_path / "images", 160)
    told = ranks.run(f"{__name__}:played", tuple(CASES), str(tmp_path))
    for workers, cases in CASES.items():
        assert [Case(*row["case"]) for row in told if row["workers"] == workers] == cases
    for row in told:
        case = (row["workers"], *row["case"])
        assert row["told"] == pytest.approx([row["loss"], *row["parts"]], rel=1e-5), case
        assert row["gradients"] == row["named"] and row["off"] < 1e-5, case
        assert 1 < row["loss"] < 6 and row["parts"][1] > 0, case  # some pairs are no negatives
