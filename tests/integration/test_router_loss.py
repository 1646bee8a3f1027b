"""The router's loss of a mixture of experts over micro-batches, workers and ZeRO stages, against plain autograd."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.engine import deepspeed_engine
from heliostat.recipes import building
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.training.worker.objective import Objective

from tests.integration import ranks
from tests.unit.build_job import BASE, job

STAGES, STEPS, MICROS, CLIP = (0, 1, 2, 3), 3, 4, 0.5
MODEL = {**BASE["model"], "arch": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True,
         "router_aux_loss_coef": 0.5}  # fmt: skip


def made(stage: int, workers: int) -> tuple[Job, CausalLM]:
    settings = {"train.zero.stage": stage, "train.precision": "fp32", "workers.count": workers, "train.optimizer.lr": 1e-2,
                "train.grad_clip": CLIP}  # fmt: skip
    j = job(model=MODEL, **settings)
    return j, CausalLM(j)


def micros(recipe: CausalLM, step: int) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of a step, whoever plays them."""
    content = np.random.default_rng(step).integers(0, 96, (MICROS, 2, 64)).astype(np.int32)
    return [recipe.batch(c) for c in content]


def stages(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """In every rank: trains at each stage as the loop does."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage in STAGES:
        j, recipe = made(stage, world)
        engine = deepspeed_engine.build_engine(j, recipe)
        objective, told = Objective(recipe), []
        for step in range(STEPS):
            mine = micros(recipe, step)[rank::world]
            sums, norm = torch.zeros(2), 0.0
            for i, micro in enumerate(mine):
                part = objective.part(engine, micro, MICROS, recipe.terms(micro) * MICROS)
                engine.backward(part.objective)
                assert part.added is not None
                sums += torch.stack([part.loss / (recipe.terms(micro) * MICROS), part.added[0]])
                if i + 1 == len(mine) and not stage:
                    norm = deepspeed_engine.gradient_norm(engine, CLIP)
                engine.step()
            norm = norm or deepspeed_engine.gradient_norm(engine, CLIP)
            dist.all_reduce(sums)
            told.append([*sums.tolist(), norm])
        if rank == 0:
            yield {"stage": stage, "told": told}


def plain() -> list[list[float]]:
    """Loss, router's loss and gradient norm of each step, by autograd and AdamW alone, from the model's own loss."""
    j, recipe = made(1, 1)
    torch.manual_seed(j.train.seed)
    model, told = recipe.build(), []
    groups = building.parameter_groups(model, j.train.optimizer.weight_decay, recipe)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=j.train.optimizer.eps)
    for step in range(STEPS):
        losses, routers = [], []
        for micro in micros(recipe, step):
            out = model(**micro)
            (out.loss / MICROS).backward()
            losses.append(out.loss.item() - 0.5 * out.aux_loss.item())
            routers.append(out.aux_loss.item())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad()
        told.append([float(np.mean(losses)), float(np.mean(routers)), norm])
    return told


@pytest.mark.ci
def test_the_router_loss_is_the_same_at_every_stage_and_on_any_number_of_workers():
    """Loss, router's loss and gradients: the mean over the step's micro-batches, wherever they are played."""
    expected = plain()
    found = ranks.run("tests.integration.test_router_loss:stages", (1, 2))
    assert len(found) == 2 * len(STAGES)
    for line in found:
        for step, (ours, theirs) in enumerate(zip(line["told"], expected, strict=True)):
            assert ours == pytest.approx(theirs, rel=2e-5), (line["stage"], line["workers"], step)
