"""Tests DeepSpeed's results on ranks without Ray: they equal plain autograd, for any key, stage, precision, and worker count."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import saver as checkpoint
from heliostat.config import spec
from heliostat.engine import deepspeed_engine, sharded_state
from heliostat.storage.locations import Location
from torch import nn

from tests.integration import ranks
from tests.unit import build_index
from tests.unit.build_job import job
from tests.unit.build_recipe import Around

BATCH, STEPS = 12, 3


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 11), nn.Linear(11, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) - y).float().square().mean()


def _engine(model: type[nn.Module], micro: int, **changes: Any) -> Any:
    changes = {
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": micro,
        "workers.count": dist.get_world_size(),
        **changes,
    }
    keys = changes.pop("train.deepspeed", {})
    keys = {**keys, "zero_optimization": {"stage3_param_persistence_threshold": 0, **keys.get("zero_optimization", {})}}
    return deepspeed_engine.build_engine(job(**changes, **{"train.deepspeed": keys}), Around(model))


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
            held = {n: t for n, t in sharded_state.of(engine).tensors().items() if n.startswith("master.")}
            elements = torch.tensor(sum(t.local.numel() for t in held.values()))
            dist.all_reduce(elements)  # what a checkpoint would hold: every element once
            if dist.get_rank() == 0:
                error = float((_masters(engine) - expected).abs().max())
                yield {"stage": stage, "key": key, "error": error, "elements": int(elements), "wanted": len(expected)}
            else:
                _masters(engine)


def test_every_key_that_is_allowed_computes_the_same_and_shards_as_a_checkpoint_expects() -> None:
    """Runs three steps of two micro-batches on two workers, at each stage that reads the key."""
    from heliostat.config import deepspeed_keys

    told = ranks.run(f"{__name__}:every_key", (2,))
    assert len(told) == sum(len(at) for _, _, at in KEYS) + 3
    assert {row["key"] for row in told} >= set(deepspeed_keys.ZeroKeys.model_fields) - {"offload_optimizer", "offload_param"}
    assert [row for row in told if not row["error"] < 1e-6 or row["elements"] != row["wanted"]] == []


def reductions(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """Yields the processes that are started in steps of ZeRO-3 after the first one."""
    started: list[Any] = []
    engine = _engine(Layers, 3, **{"train.precision": "fp32", "train.zero.stage": 3})
    _train(engine, 3, 1)
    popen = subprocess.Popen.__init__
    subprocess.Popen.__init__ = lambda self, *given, **named: (started.append(given), popen(self, *given, **named))[1]
    _train(engine, 3, 2)
    phases: list[str] = []
    gc.callbacks.append(lambda phase, info: phases.append(phase) if info["generation"] == 2 else None)
    _engine(Layers, 3, **{"train.precision": "bf16", "train.zero.stage": 1})
    yield {"started": len(started), "collections": phases.count("start")}


def test_no_step_starts_a_process_and_no_engine_collects_garbage_again_and_again() -> None:
    """In each reduction of ZeRO-3, DeepSpeed asks for the number of devices, and on CPUs it ran `numactl` for that. To print the
    used memory, it collected garbage six times while it created a bf16 engine."""
    told = ranks.run(f"{__name__}:reductions", (2,))
    assert [row["started"] for row in told] == [0, 0] and all(row["collections"] <= 2 for row in told), told


def waits(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """Yields, for each stage, how often the host waits for the device in steps of two micro-batches, and the timers that ran."""
    from deepspeed.accelerator import get_accelerator

    calls: list[int] = []
    accelerator, synchronize = get_accelerator(), get_accelerator().synchronize
    accelerator.synchronize = lambda device_index=None: (calls.append(1), synchronize(device_index))[1]
    for stage in range(4):
        engine = _engine(Layers, 3, **{"train.precision": "fp32", "train.zero.stage": stage})
        calls.clear()
        _train(engine, 3, 5)  # DeepSpeed's throughput timer waits from the third step on
        yield {"stage": stage, "calls": len(calls), "timers": sorted(engine.timers.get_timers())}


def test_the_host_does_not_wait_for_the_device_in_any_micro_batch() -> None:
    """DeepSpeed's throughput timer would wait twice in each, and its wall-clock timers, too."""
    told = ranks.run(f"{__name__}:waits", (2,))
    assert len(told) == 8 and [row for row in told if row["calls"] or row["timers"]] == []


# fp16: the loss scale ------------------------------------------------------------------------------------------------


class Steep(Layers):
    """Defines a model whose gradients overflow fp16 at first."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 64 * super().forward(x, y)


def loss_scale(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch computes in fp16 on CPUs; DeepSpeed would not ask it to
    fp16 = {"train.precision": "fp16", "workers.gpus": 1, "train.deepspeed": {"fp16": {"hysteresis": 1, "loss_scale_window": 4}}}
    for stage in (1, 2, 3):
        for accumulate in ("fp32", "same"):
            made = [
                _engine(Steep, 3, **fp16, **{"train.zero.stage": stage, "train.grad_accum_dtype": accumulate}) for _ in range(2)
            ]
            run = Location(f"{folder}/{stage}-{accumulate}")
            _train(made[0], 3, 12)
            steps, held = sharded_state.of(made[0]).steps, sharded_state.of(made[0]).read_loss_scale()
            saver = checkpoint.Saver(run, spec.Checkpoint(every=1), group)
            saver.save(12, sharded_state.of(made[0]).tensors(), build_index.facts(optimizer_steps=steps, loss_scale=held))
            saver.wait()
            found = checkpoint.open_checkpoint(run, 12)
            checkpoint.load(found, sharded_state.of(made[1]).tensors(whole=True), group)
            sharded_state.of(made[1]).after_load(steps)
            anew = sharded_state.of(made[1]).write_loss_scale(None)
            sharded_state.of(made[1]).write_loss_scale(found.index.resume["loss_scale"])
            for engine in made:
                _train(engine, 3, 6)
            ends = [{"scale": sharded_state.of(e).read_loss_scale(), "steps": sharded_state.of(e).steps} for e in made]
            gap = float((_masters(made[0]) - _masters(made[1])).abs().max())
            if dist.get_rank() == 0:
                yield {
                    "stage": stage,
                    "grad_accum_dtype": accumulate,
                    "held": held,
                    "steps": steps,
                    "ends": ends,
                    "gap": gap,
                    "anew": anew,
                }


@pytest.mark.ci
def test_fp16_goes_on_with_the_loss_scale_that_it_had(tmp_path: Path) -> None:
    """A resumed run skips exactly the steps that the unbroken one skips. Without a stored scale, a message reports it."""
    told = ranks.run(f"{__name__}:loss_scale", (2,), str(tmp_path))
    assert len(told) == 6
    for row in told:
        assert row["held"]["cur_scale"] < 65536 and row["steps"] < 12, "steps were skipped until the scale was found"
        assert row["ends"][0] == row["ends"][1] and row["gap"] == 0, row
        assert "starts again at 65536" in row["anew"]


# bf16: sums of micro-batches -----------------------------------------------------------------------------------------


MICROS = 64


def sums(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """Yields the error of a step's gradient against the fp64 sum of the micro-batches' gradients, computed by plain autograd in
    bf16."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_grad

    rank, world = dist.get_rank(), dist.get_world_size()
    for stage in (1, 2, 3):
        for accumulate in ("same", "fp32"):
            changes = {
                "train.zero.stage": stage,
                "train.grad_accum_dtype": accumulate,
                "train.global_batch_size": 4 * MICROS * world,
            }
            engine = _engine(Layers, 4, **changes, **{"train.grad_clip": 0})
            plain = Layers().bfloat16()
            with GatheredParameters(list(engine.module.parameters())):
                plain.load_state_dict({k: v.detach().clone() for k, v in engine.module.state_dict().items()})
            wanted = [torch.zeros_like(p, dtype=torch.float64) for p in plain.parameters()]
            for micro in range(MICROS):
                data = torch.randn(4, 10, generator=torch.Generator().manual_seed(micro * world + rank)).bfloat16()
                data[:, 7:] += 1  # gradients that point somewhere, so that the sum grows beyond its parts
                engine.backward(engine(data[:, :7], data[:, 7:]))
                plain.zero_grad()
                plain(data[:, :7], data[:, 7:]).backward()
                for total, p in zip(wanted, plain.parameters(), strict=True):
                    total += p.grad.double()
                if micro + 1 < MICROS:
                    engine.step()
            kept = sum(p.grad is not None for p in engine.module.parameters())
            found = torch.cat([safe_get_full_grad(p).flatten().double() for p in engine.module.parameters()])
            for total in wanted:
                dist.all_reduce(total)
            expected = torch.cat([total.flatten() for total in wanted]) / (MICROS * world)
            if rank == 0:
                yield {"case": f"{stage}-{accumulate}", "kept": kept, "error": float((found - expected).norm() / expected.norm())}


@pytest.mark.ci
def test_gradients_summed_in_fp32_are_nearer_at_every_stage() -> None:
    """For 64 micro-batches in bf16: less than half the error of sums in bf16, and below the error of one rounding to bf16."""
    told = ranks.run(f"{__name__}:sums", (2,))
    error = {row["case"]: row["error"] for row in told}
    assert all(row["kept"] == 0 for row in told if row["case"].endswith("fp32")), "gradients stay next to their sums"
    for stage in (1, 2, 3):
        assert error[f"{stage}-fp32"] < 0.5 * error[f"{stage}-same"], error
        assert error[f"{stage}-fp32"] < 0.004, error


# a submodule that is used more than once in a step -------------------------------------------------------------------


class Reused(nn.Module):
    """Uses one layer twice in a pass, a second one in only one of two branches, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.twice, self.out = nn.Linear(7, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.side, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.side.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first = self.norm(self.twice(torch.tanh(self.into(x))))
        second = self.norm(self.twice(torch.tanh(first))) + self.tied(self.side(first))
        return (self.out(second) - y).float().square().mean()


def _once(model: Any, data: torch.Tensor) -> torch.Tensor:
    return model(data[:, :7], data[:, 7:])


def _two_calls(model: Any, data: torch.Tensor) -> torch.Tensor:
    """Uses the whole model twice before the one backward pass, as in a contrastive loss."""
    return _once(model, data) + 0.5 * _once(model, data.flip(0) * 0.5)


def _checkpointed(model: Any, data: torch.Tensor) -> torch.Tensor:
    """Like `_two_calls`, with each call recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint as again

    return again(_once, model, data, use_reentrant=False) + 0.5 * again(_once, model, data.flip(0) * 0.5, use_reentrant=False)


USES = {"once": _once, "two calls": _two_calls, "checkpointed": _checkpointed}


def reused(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """Yields the error of each parameter's gradient against plain autograd's in fp32, over two micro-batches on each worker."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_grad

    rank, world = dist.get_rank(), dist.get_world_size()
    sums = [("fp32", "same"), ("bf16", "same"), ("bf16", "fp32")]
    kinds = [(s, *sum_, b) for s in (1, 2, 3) for sum_ in sums for b in (50, 1 << 20) if sum_ != ("bf16", "fp32") or b == 50]
    for stage, precision, accumulate, bucket in kinds:
        changes = {
            "train.zero.stage": stage,
            "train.precision": precision,
            "train.grad_accum_dtype": accumulate,
            "train.grad_clip": 0,
        }
        keys = {"reduce_bucket_size": bucket, "overlap_comm": bucket == 50}  # which GPUs have
        changes |= {"train.global_batch_size": 8 * world, "train.deepspeed": {"zero_optimization": keys}}
        engine = _engine(Reused, 4, **changes)
        for use, loss in USES.items():
            plain = Reused()
            with GatheredParameters(list(engine.module.parameters())):
                plain.load_state_dict({k: v.detach().float() for k, v in engine.module.state_dict().items()})
            for micro in range(2):
                if micro:
                    engine.step()
                for worker in range(world):
                    data = torch.randn(4, 10, generator=torch.Generator().manual_seed(micro * world + worker)).bfloat16().float()
                    (loss(plain, data) / (2 * world)).backward()
                    if worker == rank:
                        engine.backward(loss(engine, data if precision == "fp32" else data.bfloat16()))
            named, errors = dict(plain.named_parameters()), {}
            for name, p in engine.module.named_parameters():
                found, wanted = safe_get_full_grad(p), named[name].grad
                errors[name] = float((found.float().view(wanted.shape) - wanted).norm() / wanted.norm())
            engine.step()
            if rank == 0:
                worst = max(errors, key=lambda n: errors[n])
                case = f"zero{stage} {precision} sums {accumulate} bucket {bucket} {use}"
                yield {"case": case, "precision": precision, "error": errors[worst], "of": worst}


@pytest.mark.ci
def test_gradients_of_what_is_used_twice_in_a_step_are_autograds() -> None:
    """At stages 1 to 3, in fp32 and bf16, on 2 and 3 workers, with buckets smaller and larger than a parameter.

    DeepSpeed has had versions that reduced such a gradient too early (its issues 7718 and 8224).
    """
    told = ranks.run(f"{__name__}:reused", (2, 3))
    assert len(told) == 2 * 3 * 5 * len(USES)
    limit = {"fp32": 1e-5, "bf16": 0.02}
    assert [row for row in told if not row["error"] < limit[row["precision"]]] == []
