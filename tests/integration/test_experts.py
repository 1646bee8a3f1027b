"""Tests mixtures of experts over micro-batches, workers, and ZeRO stages: the counts, the balancing, and the exact values."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from heliostat.engine import deepspeed_engine, sharded_state
from heliostat.errors import ConfigError
from heliostat.recipes.protocol import Group
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.training.worker.objective import ExpertLoad, Objective
from torch import nn

from tests.integration import ranks
from tests.unit.build_job import job
from tests.unit.build_recipe import Around
from tests.unit.test_experts import LATENT

CASES = [(stage, precision, size) for stage in (1, 2, 3) for precision, size in (("fp32", 1), ("fp32", 2), ("bf16", 2))]
CASES += [(0, "fp32", 2)]
STEPS, BATCH, RATE = 3, 8, 0.01


def made(stage: int, precision: str, size: int, workers: int) -> CausalLM:
    """Returns a job with a learning rate of 0, so that only the biases change the experts' tokens."""
    settings = {"train.zero.stage": stage, "train.precision": precision, "workers.count": workers, "train.micro_batch_size": size,
                "train.global_batch_size": BATCH, "train.optimizer.lr": 1e-30}  # fmt: skip
    model = {**LATENT, "arch": "deepseek_v3", "router_bias_update_rate": RATE, "router_z_loss_coef": 0.01}
    return CausalLM(job(model=model, **settings))


def balanced(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """In every rank, counts and balances some steps in each case, like the training loop."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage, precision, size in CASES:
        recipe = made(stage, precision, size, world)
        engine = deepspeed_engine.build_engine(recipe.job, recipe)
        objective, load = Objective(recipe), ExpertLoad(recipe, engine)
        for step in range(STEPS):
            content = np.random.default_rng(step).integers(0, 96, (BATCH, 64)).astype(np.int32)
            micros = [recipe.batch(content[i : i + size]) for i in range(0, BATCH, size)][rank::world]
            for micro in micros:
                part = objective.part(engine, micro, len(micros) * world, recipe.terms(micro) * len(micros) * world)
                engine.backward(part.objective)
                load.add(part.routed)
                engine.step()
            load.end_step()
        told, state = load.report(), sharded_state.of(engine).tensors()
        kept = {name: b for name, b in state.items() if name.endswith("e_score_correction_bias")}
        yield {
            "case": [stage, precision, size],
            "load": told,
            "biases": {name: (str(b.dtype), b.tolist()) for name, b in kept.items()},
        }


@pytest.mark.ci
def test_the_load_is_the_same_to_the_last_token_in_any_layout():
    """Its reports, and the resulting biases, are equal at every stage, with micro-batches of one and of two samples, on one
    worker and on two.

    Biases are fp32, with bf16, too, and are in checkpoints.
    """
    found = ranks.run("tests.integration.test_experts:balanced", (1, 2))
    assert len(found) == 3 * len(CASES)
    for precision in ("fp32", "bf16"):
        of = [one for one in found if one["case"][1] == precision]
        first = of[0]
        assert len(first["load"]["imbalance"]) == STEPS and first["load"]["imbalance"][0] > 1
        assert len(first["biases"]) == 1 and any(v for _, values in first["biases"].values() for v in values)
        for one in of:
            assert one["load"] == first["load"], one["case"]
            assert one["biases"] == first["biases"], one["case"]
            assert all(dtype == "torch.float32" for dtype, _ in one["biases"].values()), one["case"]


class Sparse(nn.Module):
    """Defines experts as separate modules, each of which sees only its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (rows := torch.where(to == number)[0]).numel():
                out = out.index_add(0, rows, expert(x[rows]))
        return out


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.begin, self.layers = nn.Linear(8, 8), nn.ModuleList(Sparse() for _ in range(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        for layer in self.layers:
            x = x + layer(x, y)
        return x.square().mean()


class Own(Around):
    def group(self, name: str, shape: tuple[int, ...]) -> Group:
        return Group()


def apart(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """In every rank, trains a mixture of separate experts, with other experts in use on each rank; yields the rejected
    stages."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage in (3, 1):
        settings = {"train.zero.stage": stage, "train.precision": "fp32", "workers.count": world, "train.optimizer.lr": 1e-2}
        made, recipe = job(**{**settings, "train.global_batch_size": 2, "train.micro_batch_size": 2 // world}), Own(Mixture)
        try:
            engine = deepspeed_engine.build_engine(made, recipe)
        except ConfigError as e:
            yield {"stage": stage, "refused": str(e)}
            continue
        losses = []
        for step in range(4):
            x = torch.randn((2, 3, 8), generator=torch.Generator().manual_seed(step))
            to = torch.tensor([[0, 0, 1], [2, 3, 3] if step % 2 else [2, 2, 2]])
            mine = slice(rank, rank + 1) if world == 2 else slice(None)
            loss = engine(x[mine].flatten(0, 1), to[mine].flatten())
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(float(total) / world)
        if rank == 0:
            yield {"stage": stage, "losses": losses}


def test_separate_experts_are_gathered_whole_at_stage_3():
    """Ranks that use different experts neither wait for each other nor leave out a gradient. DeepSpeed's stages 1 and 2 would,
    and are rejected."""
    found = ranks.run("tests.integration.test_experts:apart", (1, 2), deadline_s=90)
    (right,) = [one["losses"] for one in found if (one["workers"], one["stage"]) == (1, 1)]
    trained = [one["losses"] for one in found if "losses" in one]
    assert len(trained) == 3 and all(np.allclose(losses, right, rtol=1e-5) for losses in trained)
    refused = [one for one in found if "refused" in one]
    assert {(one["workers"], one["stage"]) for one in refused} == {(2, 1)}
    assert all(one["refused"].startswith("train.zero.stage: 1 doesn't reduce the gradients") for one in refused)
