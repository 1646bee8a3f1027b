"""Tests that a job's initial weights are the same for any sharding by ZeRO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from heliostat.engine import deepspeed_engine
from heliostat.engine.engine_config import engine_config
from heliostat.recipes.text import initial
from heliostat.recipes.text.causal_lm import CausalLM

from tests.integration import ranks
from tests.unit.build_job import BASE, job

STAGES = (1, 3)


def weights(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """Yields the sums of the whole parameters of models built at each stage, and whether ZeRO had sharded them."""
    import deepspeed

    model = {**BASE["model"], "init": {"zero_output_projections": True}}
    for stage in STAGES:
        changes = {"train.zero.stage": stage, "train.precision": "fp32", "workers.count": torch.distributed.get_world_size()}
        made = job(**{"model": model, **changes})
        built = deepspeed_engine.build_model(made, CausalLM(made), engine_config(made))
        sums, divided = {}, False
        for name, p in built.named_parameters():
            divided |= hasattr(p, "ds_id")
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                sums[name] = p.detach().double().abs().sum().item()
        yield {"stage": stage, "divided": divided, "sums": sums}
        everyone.wait()


def test_output_projections_are_zeros_at_every_stage_and_all_else_is_as_without_zero():
    found = ranks.run(f"{__name__}:weights", (2,))
    assert len(found) == 2 * len(STAGES) and all(told["divided"] == (told["stage"] == 3) for told in found)
    sums = found[0]["sums"]
    assert all(told["sums"] == sums for told in found)
    assert [name for name, total in sums.items() if not total] == initial.output_projections(sums) and any(sums.values())
