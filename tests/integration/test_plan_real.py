"""Tests that the plan's training state equals that of DeepSpeed engines, on real process groups."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integration import ranks
from tests.unit.build_job import job

WORKERS = (1, 2, 3)
KEPT_WHOLE = 5_000  # elements of a parameter, at most: the norms here, and the smaller matrices
CASES = [("fp32", 0), *((p, s) for p in ("fp32", "bf16") for s in (1, 2, 3))]


def _job(precision: str, stage: int, workers: int) -> Any:
    changes: dict[str, Any] = {"train.precision": precision, "train.zero.stage": stage, "workers.count": workers}
    changes |= {
        "train.global_batch_size": 12,
        "train.micro_batch_size": 6 // workers,
        "model.hidden_size": 64,
        "model.vocab_size": 512,
    }
    changes["train.deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": KEPT_WHOLE}}
    return job(**changes)


def engines(_: Any, __: Any) -> Iterator[dict[str, Any]]:
    """On each rank, for each case, yields the bytes of an engine after half of its micro-batches, and its slices."""
    from heliostat.engine import deepspeed_engine, sharded_state
    from heliostat.recipes.text.causal_lm import CausalLM

    for precision, stage in CASES:
        j = _job(precision, stage, dist.get_world_size())
        recipe = CausalLM(j)
        engine = deepspeed_engine.build_engine(j, recipe)
        batch = recipe.batch(torch.zeros(j.train.micro_batch_size, 64, dtype=torch.int32).numpy())
        for _ in range(3):  # a step, so that stage 3 has gathered what it keeps gathered, and half of the next
            engine.backward(recipe.loss(engine, batch).sum)
            engine.step()
        slices = [
            (name.removeprefix("master."), int(t.start), t.local.numel())
            for name, t in sharded_state.of(engine).tensors().items()
            if name.startswith("master.")
        ]
        yield {"case": [precision, stage], "bytes": _held(engine, stage), "slices": slices}


def _held(engine: Any, stage: int) -> dict[str, int]:
    from heliostat.engine import sharded_state

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    parameters, inner = list(engine.module.parameters()), sharded_state.of(engine).optimizer
    low = [getattr(p, "ds_tensor", p.data) for p in parameters]
    gathered = [p.data for p in parameters if getattr(p, "ds_persist", False)]
    gradients = [p.grad for p in parameters]
    gradients += getattr(engine.optimizer, "fp32_groups_gradients_flat", [])
    if stage == 2:
        gradients += [g.flat_partition for g in engine.optimizer.averaged_gradients.values() if g]
        gradients += [g for group in engine.optimizer.all_grad_tensors.values() for g in (group or [])]
    if stage == 3:
        gradients = [engine.optimizer.grad_partitions_flat_buffer]
    return {
        "weights": size(low) + size(gathered),
        "gradients": size(gradients),
        "masters": size(flat for flat, _ in sharded_state.of(engine).groups()) if stage else 0,
        "moments": size(v for s in inner.state.values() for k, v in s.items() if k in ("exp_avg", "exp_avg_sq")),
    }


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return ranks.run("tests.integration.test_plan_real:engines", WORKERS)


@pytest.mark.ci
@pytest.mark.parametrize("part", ["weights", "gradients", "masters", "moments"])
def test_state_bytes_are_within_two_percent_of_what_engines_hold(told, part, monkeypatch):
    """At every stage and worker count, in fp32 and bf16."""
    from heliostat.plan.memory import state
    from heliostat.plan.model_stats import build, stats_of
    from heliostat.recipes.text.causal_lm import CausalLM

    assert len(told) == len(CASES) * sum(WORKERS)
    for one in told:
        precision, stage = one["case"]
        recipe = CausalLM(_job(precision, stage, one["workers"]))
        model = stats_of(recipe, build(recipe))
        held = state(model.shapes, model.frozen, one["workers"], stage, precision, persistence=KEPT_WHOLE)
        planned = getattr(held, part)
        largest = max(o["bytes"][part] for o in told if o["case"] == one["case"] and o["workers"] == one["workers"])
        assert planned == pytest.approx(largest, rel=0.02), (one["case"], one["workers"], part)


@pytest.mark.ci
def test_the_dry_runs_slices_are_those_that_ranks_save(told):
    """Parameter, start, and length, for every rank, stage, and worker count. So the index of a checkpoint is known in advance."""
    from heliostat.plan.model_stats import build, stats_of
    from heliostat.plan.zero_layout import slices
    from heliostat.recipes.text.causal_lm import CausalLM

    for one in told:
        precision, stage = one["case"]
        recipe = CausalLM(_job(precision, stage, one["workers"]))
        owned = slices(stats_of(recipe, build(recipe)).trained, stage, one["workers"])[one["rank"]]
        saved = [tuple(s) for s in one["slices"] if s[2]]
        assert sorted(saved) == sorted(owned), (one["case"], one["workers"], one["rank"])
