"""Tests a recipe with adapters on a frozen base: groups, frozen modules, parts of the loss, and a merged export, on real
ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import saver as checkpoint
from heliostat.checkpoint.index import TensorIndex
from heliostat.checkpoint.placement import Tensor
from heliostat.config import spec
from heliostat.engine import deepspeed_engine, sharded_state
from heliostat.errors import ConfigError
from heliostat.inference import export
from heliostat.recipes import building
from heliostat.recipes.protocol import Batch, Exports, Group, Loss, Part, Weight
from heliostat.storage.locations import Location
from heliostat.training.worker.objective import Objective
from safetensors.torch import load_file
from torch import nn

from tests.integration import ranks
from tests.unit import build_index
from tests.unit.build_job import job
from tests.unit.build_recipe import Around

STEPS, BATCH, LR, DECAY = 4, 12, 0.02, 0.3


class Adapted(nn.Module):
    """Defines a frozen linear layer, a low-rank change of it (Hu et al. 2021, arXiv 2106.09685), and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 13))
        self.down, self.up = nn.Linear(7, 2, bias=False), nn.Linear(2, 13, bias=False)
        self.head = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.head(torch.tanh(self.base(x) + self.up(self.down(x)))) - y).float().square().mean(1)


class LowRank(Around, Exports):
    frozen = ("base",)

    def __init__(self) -> None:
        super().__init__(Adapted)

    def group(self, name: str, shape: tuple[int, ...]) -> Group:
        return Group(lr=4.0) if name.startswith("head") else Group(weight_decay=0.0, lr=0.5)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        errors = model(**batch)
        return Loss(errors.sum(), {"worst": Part(errors.max(), 0.1), "least": Part(errors.min())})

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        merged = Weight(("base.1.weight", "up.weight", "down.weight"), shapes["base.1.weight"], lambda w, up, down: w + up @ down)
        plain = {"linear.bias": "base.1.bias", "out.weight": "head.weight"}
        return {"model": {"linear.weight": merged, **{name: Weight((was,), shapes[was]) for name, was in plain.items()}}}

    def save_config(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> nn.Module: ...  # type: ignore[empty-body]


def data(step: int) -> Batch:
    made = torch.randn(BATCH, 10, generator=torch.Generator().manual_seed(step))
    return {"x": made[:, :7], "y": made[:, 7:]}


def stages(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In every rank, at each stage, trains like the training loop, saves, and exports."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage in (0, 1, 2, 3):
        changes: dict[str, Any] = {"train.zero.stage": stage, "train.precision": "fp32", "workers.count": world}
        changes |= {"train.global_batch_size": BATCH, "train.micro_batch_size": 2, "train.optimizer.weight_decay": DECAY}
        keys = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        recipe = LowRank()
        engine = deepspeed_engine.build_engine(job(**changes, **{"train.deepspeed": keys}), recipe)
        objective, told = Objective(recipe), []
        for step in range(STEPS):
            deepspeed_engine.set_lr(engine, LR)
            micros = [{k: v[i : i + 2] for k, v in data(step).items()} for i in range(rank * 2, BATCH, 2 * world)]
            added = torch.zeros(2)
            for micro in micros:
                share = objective.part(engine, micro, BATCH // 2, BATCH)
                engine.backward(share.objective)
                added += share.added
                if micro is micros[-1] and not stage:
                    deepspeed_engine.gradient_norm(engine, 1.0)
                engine.step()
            dist.all_reduce(added)
            told.append(added.tolist())
        objective.agree(group)
        run = Location(f"{folder}/{world}-{stage}")
        saver = checkpoint.Saver(run, spec.Checkpoint(every=1), group)
        facts = build_index.facts(world_size=world, zero_stage=stage)
        saver.save(1, sharded_state.of(engine).tensors(), facts, sharded_state.of(engine).frozen())
        saver.wait()
        if rank == 0:
            shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()}
            found = checkpoint.open_checkpoint(run, 1)
            ((file, tensors),) = export._files(recipe, shapes, found).items()
            export.write_weights(found, shapes, torch.float32, Path(run.path) / file, tensors)
            read = load_file(f"{run.path}/model.safetensors")
            yield {"stage": stage, "told": told, "weights": {n: t.flatten().tolist() for n, t in read.items()},
                   "training": engine.module.base[0].training}  # fmt: skip
        objective.names = [f"part_{rank}"]
        try:
            objective.agree(group)
        except ConfigError as e:
            yield {"stage": stage, "error": str(e)}


def plain() -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """Computes the same with autograd and AdamW alone."""
    model = Adapted()
    model.base.requires_grad_(False)
    model.base[0].eval()
    head = list(model.head.parameters())
    rest = [model.down.weight, model.up.weight]
    groups = [{"params": head, "weight_decay": DECAY, "lr": 4 * LR}, {"params": rest, "weight_decay": 0.0, "lr": LR / 2}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    told = []
    for step in range(STEPS):
        batch = data(step)
        errors = model(**batch).view(-1, 2)
        worst, least = errors.max(1).values.mean(), errors.min(1).values.mean()
        (errors.mean() + 0.1 * worst).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told.append([worst.item(), least.item()])
    merged = model.base[1].weight + model.up.weight @ model.down.weight
    return {"linear.weight": merged, "linear.bias": model.base[1].bias, "out.weight": model.head.weight}, told


def test_groups_frozen_modules_parts_and_a_merged_export_are_autograds_at_every_stage(tmp_path: Path) -> None:
    """On 1, 2, and 3 workers: learning rates and weight decay by group, no dropout in frozen modules, parts as means over the
    micro-batches, and adapters merged tensor by tensor.

    Ranks with other names of parts get an error, on all ranks.
    """
    weights, parts = plain()
    rows = ranks.run(f"{__name__}:stages", (1, 2, 3), str(tmp_path))
    found = [row for row in rows if "weights" in row]
    assert len(found) == 3 * 4
    for row in found:
        assert row["weights"].keys() == weights.keys() and row["training"] is False
        for name, values in row["weights"].items():
            assert values == pytest.approx(weights[name].flatten().tolist(), abs=2e-5), (row["stage"], row["workers"], name)
        for step, (ours, theirs) in enumerate(zip(row["told"], parts, strict=True)):
            assert ours == pytest.approx(theirs, rel=2e-4), (row["stage"], row["workers"], step)
    errors = [row["error"] for row in rows if "error" in row]
    assert len(errors) == 4 * (2 + 3) and all("returns different parts on other workers" in e for e in errors)


def test_what_an_export_leaves_out_is_said_and_what_cannot_be_made_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, run = LowRank(), Location(str(tmp_path))
    names = {n: list(p.shape) for n, p in building.build(recipe).named_parameters()}
    entries = {f"master.{n}": Tensor("F32", shape) for n, shape in names.items()}
    found = checkpoint.SavedCheckpoint(run, TensorIndex(4, [], entries))
    shapes = {n: tuple(shape) for n, shape in names.items()}
    with caplog.at_level(logging.WARNING):
        export._files(recipe, shapes, found)
    assert "the export leaves out 1 parameters, for example head.bias" in caplog.text
    two = {"both": Weight(("up.weight", "down.weight"), (13, 2))}
    with pytest.raises(ConfigError, match="the export's 'both' combines 2 tensors and has no `make`"):
        export.write_weights(found, shapes, torch.float32, tmp_path / "model", two)
