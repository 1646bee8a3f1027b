"""What DeepSpeed computes, on ranks without Ray: the same as plain autograd, whatever key, stage, precision and worker count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from heliostat.train import fragments, zero
from torch import nn
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from tests.integration import ranks
from tests.unit.build_job import job

BATCH, STEPS = 12, 3


class Recipe:
    """Any model, built under zero.Init at stage 3, as large ones are."""

    def __init__(self, model: type[nn.Module]) -> None:
        self.model = model

    def build(self) -> nn.Module:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=deepspeed_config()) if is_deepspeed_zero3_enabled() else nullcontext():
            return self.model()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 11), nn.Linear(11, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) - y).float().square().mean()


def _engine(model: type[nn.Module], micro: int, **changes: Any) -> Any:
    changes = {"train.global_batch": BATCH, "train.micro_batch": micro, "workers.count": dist.get_world_size(), **changes}
    keys = changes.pop("train.deepspeed", {})
    keys = {**keys, "zero_optimization": {"stage3_param_persistence_threshold": 0, **keys.get("zero_optimization", {})}}
    engine = zero.build_engine(job(**changes, **{"train.deepspeed": keys}), Recipe(model))  # type: ignore[arg-type]
    fragments.make_room(engine)
    return engine


def _data(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(BATCH, 10, generator=torch.Generator().manual_seed(step)).to(dtype)


def _train(engine: Any, micro: int, steps: int = STEPS) -> None:
    for step in range(steps):
        mine = _data(step, next(engine.module.parameters()).dtype).chunk(dist.get_world_size())[dist.get_rank()]
        for part in mine.split(micro):
            engine.backward(engine(part[:, :7], part[:, 7:]))
            engine.step()


def _masters(engine: Any) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    stage = engine.zero_optimization_stage()
    return torch.cat([(safe_get_full_fp32_param(p) if stage else p.data).flatten() for p in engine.module.parameters()]).clone()


# what `train.deepspeed` may hold -------------------------------------------------------------------------------------

BOTH, LOW, HIGH = (1, 2, 3), (1, 2), (3,)
KEYS: list[tuple[str, Any, tuple[int, ...]]] = [
    ("reduce_bucket_size", 50, BOTH),
    ("allgather_bucket_size", 50, LOW),
    ("overlap_comm", True, BOTH),
    ("contiguous_gradients", False, BOTH),
    ("reduce_scatter", False, BOTH),
    ("allgather_partitions", False, LOW),
    ("use_multi_rank_bucket_allreduce", False, LOW),
    ("sub_group_size", 100, HIGH),
    ("stage3_prefetch_bucket_size", 0, HIGH),
    ("stage3_param_persistence_threshold", 100, HIGH),
    ("stage3_model_persistence_threshold", 20, HIGH),
    ("stage3_max_live_parameters", 10, HIGH),
    ("stage3_max_reuse_distance", 0, HIGH),
    ("stage3_module_granularity_threshold", 1, HIGH),
    ("stage3_use_all_reduce_for_fetch_params", True, HIGH),
    ("stage3_allgather_sequential", True, HIGH),
    ("memory_efficient_linear", False, HIGH),
]


def every_key(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    for stage in BOTH:
        usual = {"train.precision": "fp32", "train.zero.stage": stage, "train.optimizer.lr": 0.05}
        _train(plain := _engine(Layers, 3, **usual), 3)
        expected, plan = _masters(plain), [(key, {"zero_optimization": {key: value}}) for key, value, at in KEYS if stage in at]
        for key, given in [*plan, ("communication_data_type", {"communication_data_type": "fp32"})]:
            _train(engine := _engine(Layers, 3, **usual, **{"train.deepspeed": given}), 3)
            held = {n: t for n, t in fragments.state(engine).items() if n.startswith("master.")}
            elements = torch.tensor(sum(t.local.numel() for t in held.values()))
            dist.all_reduce(elements)  # what a checkpoint would hold: every element once
            if dist.get_rank() == 0:
                error = float((_masters(engine) - expected).abs().max())
                yield {"stage": stage, "key": key, "error": error, "elements": int(elements), "wanted": len(expected)}
            else:
                _masters(engine)


def test_every_key_that_is_allowed_computes_the_same_and_shards_as_a_checkpoint_expects() -> None:
    """Three steps of two micro-batches on two workers, at each stage that reads the key."""
    from heliostat import deepspeed_keys

    told = ranks.run(f"{__name__}:every_key", (2,))
    assert len(told) == sum(len(at) for _, _, at in KEYS) + 3
    assert {row["key"] for row in told} >= set(deepspeed_keys.Zero.model_fields) - {"offload_optimizer", "offload_param"}
    assert [row for row in told if not row["error"] < 1e-6 or row["elements"] != row["wanted"]] == []
