"""Tests that the keys that reduce traffic between nodes don't change the results: a second copy of the weights, state sharded
within groups, and rounded weights.

Four workers are in two groups of two. The expected content of a checkpoint is read from the engine with DeepSpeed's own
accessors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import saver as checkpoint
from heliostat.config import spec
from heliostat.engine import deepspeed_engine, sharded_state
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from torch import nn

from tests.integration import ranks
from tests.integration.test_checkpoint_matrix import AFTER, BATCH, TRAINED, Model, _play, _poison, _whole
from tests.unit import build_index
from tests.unit.build_job import job
from tests.unit.build_recipe import Around

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"train.zero.stage": 3},
    "stage 1": {"train.zero.stage": 1},
    "divided": {"train.zero.stage": 3, "train.zero.shard_group_size": 2},
    "copied": {"train.zero.stage": 3, "train.zero.hpz_partition_size": 2},
}
WORKERS = 4


def engine(precision: str, model: type[nn.Module] = Model, lr: float = 0.05, **changes: Any) -> Any:
    """Creates an engine in bf16 with several micro-batches per step, whose sums are fp32."""
    changes |= {
        "train.precision": precision,
        "workers.count": WORKERS,
        "train.global_batch_size": BATCH,
        "train.optimizer.lr": lr,
    }
    changes["train.micro_batch_size"] = BATCH // WORKERS // (3 if precision == "bf16" else 1)
    changes["train.deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return deepspeed_engine.build_engine(job(**changes), Around(model))


def save(made: Any, run: Location, group: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Trains, saves, and continues to train; returns the expected content of the checkpoint, and all losses."""
    losses = _play(made, 0, TRAINED)
    saver = checkpoint.Saver(run, spec.Checkpoint(every=1), group)
    saver.attach(sharded_state.of(made).optimizer)
    held = _whole(made)
    facts = build_index.facts(optimizer_steps=sharded_state.of(made).steps)
    saver.save(TRAINED, sharded_state.of(made).tensors(), facts, sharded_state.of(made).frozen())
    losses += _play(made, TRAINED, AFTER)
    saver.wait()
    return held, losses


def load(made: Any, run: Location, group: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    with torch.no_grad():
        made(torch.ones(1, 7, dtype=next(made.module.parameters()).dtype), 0.0)  # so that what it copies is there, and is stale
    found = checkpoint.open_checkpoint(run, TRAINED)
    _poison(made)
    checkpoint.load(found, sharded_state.of(made).tensors(whole=True) | sharded_state.of(made).frozen(whole=True), group)
    sharded_state.of(made).after_load(found.index.resume["optimizer_steps"])
    return _whole(made), _play(made, TRAINED, AFTER)


def ways(group: Any, everyone: Any, folder: str, precision: str) -> Iterator[dict[str, Any]]:
    """In each of four ranks, saves with each of the keys, and loads with the same key, from a plain save, and into a plain
    engine."""
    runs = {way: Location(f"{folder}/{precision}-{way}") for way in WAYS}
    engines = {way: engine(precision, **given) for way, given in WAYS.items()}
    saved = {way: save(made, runs[way], group) for way, made in engines.items()}
    for way, (held, losses) in saved.items():
        plain = saved["plain"][0]
        same = all(torch.equal(held[name], plain[name]) for name in plain)
        yield {"way": way, "losses": losses, "same": same, "digest": float(sum(t.double().sum() for t in held.values()))}
    for way, (held, losses) in saved.items():
        for other, made in engines.items():
            if way == other or "plain" in (way, other):
                got, next_ = load(made, runs[way], group)
                unequal = [name for name in held if not torch.equal(held[name].to(got[name].dtype), got[name])]
                yield {"saved": way, "loaded": other, "unequal": unequal, "losses": next_, "unbroken": losses[TRAINED:]}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), pytest.param("bf16", 2e-2, marks=pytest.mark.ci)])
def test_a_second_copy_gives_the_same_bits_and_groups_the_same_losses(precision, tolerance, tmp_path) -> None:
    """A checkpoint is the same state, bit by bit, with and without them, and all workers end with the same weights."""
    told = ranks.run(f"{__name__}:ways", (WORKERS,), str(tmp_path), precision)
    trained = {(row["way"], row["rank"]): row for row in told if "way" in row}
    plain = trained["plain", 0]["losses"]
    assert plain[-1] < 0.9 * plain[0]
    for rank in range(WORKERS):
        assert trained["copied", rank]["losses"] == plain and trained["copied", rank]["same"]
        assert trained["divided", rank]["losses"] == pytest.approx(plain, rel=tolerance)
        assert trained["divided", rank]["digest"] == trained["divided", 0]["digest"]
    loaded = [row for row in told if "saved" in row]
    assert {(row["saved"], row["loaded"]): row["unequal"] for row in loaded if row["unequal"]} == {}
    for row in loaded:
        exact = row["saved"] == row["loaded"] or {row["saved"], row["loaded"]} == {"plain", "copied"}
        assert row["losses"] == (row["unbroken"] if exact else pytest.approx(row["unbroken"], rel=tolerance)), row


class Even(nn.Module):
    """Defines parameters of which each of four workers has multiples of eight elements."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(7, 64, bias=False)
        self.layers = nn.Sequential(first, nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 32))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layers(x)[:, :3] - y).float().square().mean()


class Twin:
    """Computes the results of DeepSpeed's kernel in torch: 8 bits, symmetric, with a scale per group, and back in fp16."""

    Symmetric = True

    def __init__(self) -> None:
        self.calls = 0

    def quantize(self, values: torch.Tensor, groups: int, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
        assert values.dtype == torch.float16 and bits == 8 and symmetric
        self.calls += 1
        each = values.float().view(groups, -1)
        scales = each.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return (each / scales).round().to(torch.int8).view(values.shape), scales.view(-1)  # gloo wants it flat

    def dequantize(self, values: torch.Tensor, scales: torch.Tensor, groups: int, bits: int, symmetric: bool) -> torch.Tensor:
        return (values.view(groups, -1).float() * scales.view(groups, 1)).half().view(values.shape)


def rounded(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

    CUDAQuantizer.quantizer_cuda_module = twin = Twin()
    given = {"train.zero.stage": 3, "train.zero.quantize_weights": True, "workers.gpus": 1}
    plain = _play(engine("bf16", Even, 0.005, **{"train.zero.stage": 3}), 0, TRAINED + AFTER)
    for name, more in {"rounded": {}, "rounded and copied": {"train.zero.hpz_partition_size": 2}}.items():
        run, made = Location(f"{folder}/{name}"), engine("bf16", Even, 0.005, **given, **more)
        held, losses = save(made, run, group)
        got, next_ = load(made, run, group)
        same = all(torch.equal(held[key], got[key]) for key in held)
        yield {"name": name, "plain": plain, "losses": losses, "next": next_, "same": same, "calls": twin.calls}
    try:
        engine("bf16", Model, **given)
    except ConfigError as e:
        yield {"name": "uneven", "error": str(e)}


@pytest.mark.ci
def test_weights_that_travel_in_8_bits_resume_exactly(tmp_path) -> None:
    """Uses DeepSpeed's own path, with the CPU reference implementation of its kernel. A checkpoint has the unrounded master
    weights, and resumes bit by bit."""
    told = ranks.run(f"{__name__}:rounded", (WORKERS,), str(tmp_path))
    for row in told:
        if row["name"] == "uneven":
            assert row["error"].startswith("train.zero.quantize_weights: ") and "multiples of 8" in row["error"]
            continue
        assert row["calls"] > 10 and row["losses"] != row["plain"]
        assert row["losses"] == pytest.approx(row["plain"], rel=2e-2)
        assert row["same"] and row["next"] == row["losses"][TRAINED:]
    assert len(told) == 3 * WORKERS


class Whole(Around):
    """Defines a model that isn't built in shards, and starts differently on each worker."""

    def build(self) -> nn.Module:
        model = self.model()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * dist.get_rank())
        return model


class Halves(Around):
    """Defines a model of two parts that are built in shards, one after the other."""

    def build(self) -> nn.Module:
        model: Any = super().build()
        model.before = Around(lambda: nn.LayerNorm(7)).build()
        return model


def beginnings(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In each of four ranks, trains a model that was built whole, in groups whose norms differ a little, and one that was built
    in two parts."""
    given = {"train.precision": "fp32", "workers.count": WORKERS, "train.global_batch_size": BATCH, "train.zero.stage": 3}
    given |= {"train.micro_batch_size": BATCH // WORKERS, "train.optimizer.lr": 0.05, "train.grad_clip": 0.01}
    made = deepspeed_engine.build_engine(job(**given, **{"train.zero.shard_group_size": 2}), Whole(Model))
    norm: Any = made.optimizer.get_grad_norm_direct
    off = 1 + 1e-6 * sharded_state.of(made).replicas[0]
    made.optimizer.get_grad_norm_direct = lambda *each, **named: norm(*each, **named) * off
    _play(made, 0, TRAINED)
    yield {"masters": [float(t.double().sum()) for name, t in sorted(_whole(made).items()) if name.startswith("master")]}
    deepspeed_engine.destroy_engines()
    deepspeed_engine.forget_groups()
    losses = _play(deepspeed_engine.build_engine(job(**given, **{"train.zero.hpz_partition_size": 2}), Halves(Model)), 0, TRAINED)
    yield {"losses": losses}


@pytest.mark.ci
def test_groups_begin_and_clip_alike_whatever_each_would_do_by_itself(tmp_path) -> None:
    """Groups hold copies of the state, which stay equal only through the same steps from the same start."""
    told = ranks.run(f"{__name__}:beginnings", (WORKERS,), str(tmp_path))
    masters = {row["rank"]: row["masters"] for row in told if "masters" in row}
    assert len(masters) == WORKERS and all(held == masters[0] for held in masters.values())
    assert len([row for row in told if "losses" in row]) == WORKERS


def overflowing(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """In each of four ranks, trains in fp16 in two groups, of which only the second sees an overflow in the second step."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    get_accelerator().is_fp16_supported = lambda: True  # torch computes in fp16 on CPUs; DeepSpeed would not ask it to
    own, asked = Zero.has_overflow, list[int]()

    def odd(self: Any, *given: Any, **named: Any) -> bool:
        asked.append(1)
        return own(self, *given, **named) or (len(asked) == 2 and dist.get_rank() >= 2)

    Zero.has_overflow = odd
    given = {"train.precision": "fp16", "workers.count": WORKERS, "workers.gpus": 1, "train.zero.stage": 3}
    given |= {"train.zero.shard_group_size": 2, "train.global_batch_size": BATCH, "train.micro_batch_size": BATCH // WORKERS}
    given |= {"train.optimizer.lr": 0.05, "train.deepspeed": {"fp16": {"initial_scale_power": 4}}}
    made = deepspeed_engine.build_engine(job(**given), Around(Model))
    _play(made, 0, TRAINED)
    masters = [float(t.double().sum()) for name, t in sorted(_whole(made).items()) if name.startswith("master")]
    yield {"skipped": made.skipped_steps, "steps": len(asked), "masters": masters}


@pytest.mark.ci
def test_groups_skip_a_step_together_if_one_of_them_sees_an_overflow() -> None:
    """A group that made the step would wait forever for the others, and have other weights."""
    told = ranks.run(f"{__name__}:overflowing", (WORKERS,))
    assert len(told) == WORKERS and all(row["masters"] == told[0]["masters"] for row in told)
    assert all(row["skipped"] == 1 and row["steps"] == TRAINED for row in told), told
