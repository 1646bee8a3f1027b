"""Tests that a checkpoint saved at any ZeRO stage, worker count, and offload is the same state, bit by bit, at any other.

This also holds between precisions, where values with fewer bits are rounded. The model is built under zero.Init, like large ones.
At stage 3, this makes its float buffers bf16, which are fp32 below.

The expected content of a checkpoint is read from the engine with DeepSpeed's own accessors, and every engine is filled with NaN
before a load. Saves run during the next steps, as in training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import saver as checkpoint
from heliostat.config import spec
from heliostat.engine import deepspeed_engine, sharded_state
from heliostat.storage.locations import Location
from safetensors.torch import load_file, save_file
from torch import nn

from tests.integration import ranks
from tests.unit import build_index
from tests.unit.build_job import job
from tests.unit.build_recipe import Around

pytestmark = pytest.mark.ci
WORKERS = (1, 2, 3, 4)
BATCH = 12  # divisible by them
TRAINED, AFTER = 3, 2  # steps before and after the save


@dataclass(frozen=True)
class Case:
    """Describes the configuration of an engine."""

    precision: str
    stage: int
    workers: int
    offload: bool = False
    micros: int = 1  # of each worker in a step; more than one are summed in fp32

    def __str__(self) -> str:
        more = f"{'-offload' if self.offload else ''}{f'-{self.micros}micros' if self.micros > 1 else ''}"
        return f"{self.precision}-zero{self.stage}{more}-{self.workers}"


CASES = [
    *(Case("fp32", stage, n) for n in WORKERS for stage in range(4)),
    *(Case("bf16", stage, n) for n in WORKERS for stage in (1, 2, 3)),
    *(Case("fp32", stage, 2, offload=True) for stage in (1, 2, 3)),
    *(Case("bf16", stage, 3, micros=2) for stage in (1, 2, 3)),
]


class Model(nn.Module):
    """Defines parameters whose sizes no worker count divides, one with a single element, one that isn't trained, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 11, bias=False), nn.Linear(11, 3)
        )
        self.scale = nn.Parameter(torch.ones(1))
        self.kept = nn.Parameter(torch.linspace(0.1, 1, 7), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mark", torch.zeros(5, 3))
        self.register_buffer("odd", torch.zeros(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return (self.layers(x * self.kept) * self.scale - y).float().square().mean()


def _engine(case: Case) -> Any:
    changes = {"train.zero.stage": case.stage, "train.precision": case.precision, "workers.count": case.workers}
    changes |= {"train.global_batch_size": BATCH, "train.optimizer.lr": 0.05}
    changes["train.micro_batch_size"] = BATCH // case.workers // case.micros
    if case.offload:
        changes["train.zero.offload.optimizer"] = "cpu"
    # tiny parameters would otherwise stay gathered, and hide faults of stage 3
    changes["train.deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return deepspeed_engine.build_engine(job(**changes), Around(Model))


def _play(engine: Any, first: int, steps: int) -> list[float]:
    """Trains steps [first, first + steps); returns each step's loss over the global batch."""
    losses = []
    for step in range(first, first + steps):
        data = torch.randn(BATCH, 10, generator=torch.Generator().manual_seed(step)).to(next(engine.module.parameters()).dtype)
        parts = data.chunk(dist.get_world_size())[dist.get_rank()].split(engine.train_micro_batch_size_per_gpu())
        total = torch.zeros(())
        for part in parts:
            loss = engine(part[:, :7], part[:, 7:])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(parts)
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def _whole(engine: Any) -> dict[str, torch.Tensor]:
    """Returns the full fp32 master weights, moments, buffers, and untrained parameters, by DeepSpeed's accessors."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    out = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            with GatheredParameters([p]):
                out[f"frozen.{name}"] = p.detach().clone()
        elif engine.zero_optimization_stage():
            out[f"master.{name}"] = safe_get_full_fp32_param(p)
            out |= {f"{key}.{name}": safe_get_full_optimizer_state(p, key) for key in sharded_state.of(engine).moments[p]}
        else:
            out[f"master.{name}"] = p.data
            out |= {f"{key}.{name}": engine.optimizer.state[p][key] for key in sharded_state.of(engine).moments[p]}
    out |= {f"buffer.{name}": b for name, b in engine.module.named_buffers()}
    return {name: t.detach().reshape(-1).clone() for name, t in out.items()}


def _poison(engine: Any) -> None:
    """Fills the state with NaN, so that values that a load doesn't write are visible."""
    for tensor in sharded_state.of(engine).tensors(whole=True).values():
        local = tensor.local if isinstance(tensor, sharded_state.FlatShard) else tensor
        local.fill_(float("nan") if local.is_floating_point() else -1)
    for p in engine.module.parameters():
        getattr(p, "ds_tensor", p).data.fill_(float("nan"))


def _save(case: Case, engine: Any, folder: Path, group: Any) -> None:
    _play(engine, 0, TRAINED)
    engine.module.mark.copy_(torch.linspace(0.1, case.stage + case.workers, 15).view(5, 3))  # no bf16 numbers
    engine.module.odd.fill_(1 / 3)
    saver = checkpoint.Saver(Location(str(folder / str(case))), spec.Checkpoint(every=1), group)
    saver.attach(sharded_state.of(engine).optimizer)
    expected = _whole(engine)
    facts = build_index.facts(optimizer_steps=sharded_state.of(engine).steps)
    saver.save(TRAINED, sharded_state.of(engine).tensors(), facts, sharded_state.of(engine).frozen())
    losses = _play(engine, TRAINED, AFTER)
    saver.wait()
    if dist.get_rank() == 0:
        save_file(expected, folder / f"{case}.safetensors")
        (folder / f"{case}.json").write_text(json.dumps(losses))


def _load(saved: Case, engine: Any, folder: Path, group: Any, goes_on: bool) -> dict[str, Any]:
    found = checkpoint.open_checkpoint(Location(str(folder / str(saved))), TRAINED)
    _poison(engine)
    state = sharded_state.of(engine).tensors(whole=True) | sharded_state.of(engine).frozen(whole=True)
    checkpoint.load(found, state, group)
    said = checkpoint.casts(found, state) or ""
    sharded_state.of(engine).after_load(found.index.resume["optimizer_steps"])
    expected, got = load_file(folder / f"{saved}.safetensors"), _whole(engine)
    types = {n: (expected[n].dtype, got[n].dtype) for n in expected}
    unequal = [n for n in expected if not torch.equal(expected[n].to(got[n].dtype), got.pop(n))] + sorted(got)
    cast = [f"{n}: {a} -> {b}".replace("torch.", "") for n, (a, b) in types.items() if a != b]
    told = {"unequal": unequal[:5], "cast": cast, "said": said}
    if goes_on:
        told |= {"losses": _play(engine, TRAINED, AFTER), "unbroken": json.loads((folder / f"{saved}.json").read_text())}
    return told


def _paired(saved: Case, loaded: Case) -> bool:
    """Returns all pairs of one precision. For two precisions, returns every pair of stages, from two workers to three and
    back."""
    plain = not (saved.offload or loaded.offload) and saved.micros == loaded.micros == 1
    return saved.precision == loaded.precision or (plain and {saved.workers, loaded.workers} == {2, 3})


def _goes_on(saved: Case, loaded: Case) -> bool:
    """Returns whether the pair also trains: a third of the pairs, several per case. The steps follow from the state, which every
    pair compares whole."""
    return saved == loaded or (CASES.index(saved) + CASES.index(loaded)) % 3 == 0


def pairs(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Runs in every rank of four process groups: each saves in all of its cases, then loads all saved checkpoints."""
    engines = {case: _engine(case) for case in CASES if case.workers == dist.get_world_size()}
    for case, engine in engines.items():
        _save(case, engine, Path(folder), group)
    everyone.wait()
    for case, engine in engines.items():
        for saved in CASES:
            if _paired(saved, case):
                told = _load(saved, engine, Path(folder), group, _goes_on(saved, case))
                if dist.get_rank() == 0:
                    yield {"saved": str(saved), "loaded": str(case), **told}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run(f"{__name__}:pairs", WORKERS, str(tmp_path_factory.mktemp("matrix")), deadline_s=480)


def _of(matrix: list[dict[str, Any]], saved: str, loaded: str) -> list[dict[str, Any]]:
    return [row for row in matrix if row["saved"].startswith(saved) and row["loaded"].startswith(loaded)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_pair_of_stages_and_worker_counts_holds_the_same_state_bit_by_bit(precision, matrix) -> None:
    """Compares fp32 master weights, both moments, and buffers; and no pair was left out."""
    cases = [str(c) for c in CASES if c.precision == precision]
    told = {(row["saved"], row["loaded"]): row["unequal"] for row in _of(matrix, precision, precision)}
    assert told == {(saved, loaded): [] for saved in cases for loaded in cases}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_next_losses_are_those_of_the_unbroken_run(precision, tolerance, matrix) -> None:
    """So the weights that the forward pass uses, and the optimizer's step count, are right, too."""
    rows = [row for row in _of(matrix, precision, precision) if "losses" in row]
    for way in ("saved", "loaded"):
        times = Counter(row[way] for row in rows)
        assert times.keys() == {str(c) for c in CASES if c.precision == precision} and min(times.values()) > 3, times
    for row in rows:
        assert row["losses"] == pytest.approx(row["unbroken"], rel=tolerance), (row["saved"], row["loaded"])
    assert max(len(set(row["losses"])) for row in rows) == AFTER  # it does train on


@pytest.mark.parametrize(("saved", "loaded"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_checkpoint_of_another_precision_holds_the_same_numbers(saved, loaded, matrix) -> None:
    """Bit by bit, except for buffers that the engine holds with fewer bits: those are rounded. The next losses are near."""
    rows = _of(matrix, saved, loaded)
    assert len(rows) == 2 * 3 * 4
    assert {(row["saved"], row["loaded"]): row["unequal"] for row in rows if row["unequal"]} == {}
    going_on = [row for row in rows if "losses" in row]
    assert {len({row[way] for row in going_on}) for way in ("saved", "loaded")} == {3 * 2, 4 * 2}  # all stages, 2 and 3 workers
    for row in going_on:
        assert row["losses"] == pytest.approx(row["unbroken"], rel=2e-2), (row["saved"], row["loaded"])


def test_buffers_of_other_types_at_other_stages_are_cast_and_rounding_is_said(matrix) -> None:
    """bf16 has fp32 buffers at stages 1 and 2, and bf16 buffers at stage 3. The numbers stay in both directions. Only the
    direction to fewer bits is logged, with the number of tensors."""
    cast = {(row["saved"], row["loaded"]): (row["cast"], row["said"]) for row in matrix}
    down, said = cast["bf16-zero2-2", "bf16-zero3-3"]
    assert down == ["buffer.mark: float32 -> bfloat16", "buffer.odd: float32 -> bfloat16"]
    assert said.endswith("rounded to the precision of this run: 2 tensors from float32 to bfloat16 (buffer.mark, ...)")
    up, unsaid = cast["bf16-zero3-3", "bf16-zero2-2"]
    assert up == ["buffer.mark: bfloat16 -> float32", "buffer.odd: bfloat16 -> float32"] and not unsaid
    assert not any(said for rows, said in cast.values() if not rows)
