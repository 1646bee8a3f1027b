"""Tests every optimizer that a job may name, on real engines: it trains like torch's own, and its checkpoints are resharded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import saver as checkpoint
from heliostat.config import spec
from heliostat.config.averages import Ema
from heliostat.engine import deepspeed_engine, ema, sharded_state
from heliostat.numerics import play
from heliostat.optim import power_averages, whole_matrices
from heliostat.optim.whole_matrices import Matrix
from heliostat.plan import memory
from heliostat.recipes import building
from heliostat.storage.locations import Location
from safetensors.torch import load_file, save_file
from torch import nn

from tests.integration import ranks, selection
from tests.unit import build_index
from tests.unit.build_job import job
from tests.unit.build_power_average import profile
from tests.unit.build_recipe import Around

WORKERS, BATCH, TRAINED, AFTER = (1, 2), 8, 3, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 0.02, "weight_decay": 0.5},
    "sgd-momentum": {"name": "sgd", "lr": 0.05, "momentum": 0.8, "weight_decay": 0.5},
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.5},
    "rmsprop": {"name": "rmsprop", "lr": 0.002, "weight_decay": 0.5},
    "lion": {"name": "lion", "lr": 0.005, "weight_decay": 0.5},
    "schedule_free": {"name": "schedule_free", "lr": 0.02, "weight_decay": 0.5},
    "muon": {"name": "muon", "lr": 0.05, "adamw_lr": 0.02, "weight_decay": 0.5},
}


OPTIMIZERS = pytest.mark.parametrize("variant", selection.kept(VARIANTS, "adamw", "muon"))
EVERY_PAIR = ("schedule_free", "muon")  # of the others, whose moments are as AdamW's, a layout loads its own and one more


class Layout(NamedTuple):
    precision: str
    stage: int
    workers: int


LAYOUTS = [
    *(Layout("fp32", stage, n) for stage in range(4) for n in WORKERS),
    *(Layout("bf16", stage, n) for stage in (1, 2, 3) for n in WORKERS),
]


def _other(own: int) -> int:
    """Returns a configuration with other workers, another stage and, for some optimizers, another precision."""
    return (own + 5) % len(LAYOUTS)


class Model(nn.Module):
    """Defines matrices and vectors whose sizes the workers divide, so that no padding is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) - y).float().square().mean()


def _job(variant: str, layout: Layout) -> spec.Job:
    changes = {"train.optimizer": VARIANTS[variant], "train.precision": layout.precision, "train.zero.stage": layout.stage}
    changes |= {
        "workers.count": layout.workers,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": 2,
        "train.grad_clip": 0,
    }
    if VARIANTS[variant]["name"] == "schedule_free":
        changes["train.schedule"] = {"name": "constant", "warmup_steps": 2}
    changes["train.deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return job(**changes)


def _data(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(step))


def _play(engine: Any, first: int, steps: int) -> list[float]:
    """Trains steps [first, first + steps); returns each step's loss over the global batch."""
    losses = []
    for step in range(first, first + steps):
        mine = _data(step).chunk(dist.get_world_size())[dist.get_rank()].to(next(engine.module.parameters()).dtype).split(2)
        total = torch.zeros(())
        for part in mine:
            loss = engine(part[:, :8], part[:, 8:])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(mine)
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def _plain(variant: str) -> list[float]:
    """Returns the losses of torch alone: without DeepSpeed, with the whole batch at once."""
    made = _job(variant, LAYOUTS[0])
    torch.manual_seed(made.train.seed)
    model, losses = Model(), []
    settings = made.train.optimizer
    groups = building.parameter_groups(model, settings.weight_decay, Around(Model), settings.orthogonalizes)
    optimizer = settings.build([{**group, "warmup": made.train.schedule.warmup_steps} for group in groups])
    for step in range(TRAINED + AFTER):
        loss = model(_data(step)[:, :8], _data(step)[:, 8:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def _load(run: Location, engine: Any, group: Any) -> None:
    found, state = checkpoint.open_checkpoint(run, TRAINED), sharded_state.of(engine).tensors(whole=True)
    for tensor in state.values():
        getattr(tensor, "local", tensor).fill_(float("nan"))  # what a load does not write will be seen
    checkpoint.load(found, state, group)
    sharded_state.of(engine).after_load(found.index.resume["optimizer_steps"])


def _held(engine: Any) -> int:
    """Returns the bytes of the optimizer's state in torch on this rank, without its counters."""
    states = sharded_state.of(engine).optimizer.state.values()
    return sum(t.numel() * t.element_size() for s in states for k, t in s.items() if torch.is_tensor(t) and k != "step")


def grid(group: Any, everyone: Any, folder: str, *variants: str) -> Iterator[dict[str, Any]]:
    """In every rank, these optimizers train and save in each configuration. A new engine resumes from there, and from other
    configurations' checkpoints."""
    world = dist.get_world_size()
    cases = [(variant, layout) for variant in variants for layout in LAYOUTS if layout.workers == world]
    kept = {}
    for variant, layout in cases:
        made = _job(variant, layout)
        engine = deepspeed_engine.build_engine(made, Around(Model))
        losses = _play(engine, 0, TRAINED)
        saver = checkpoint.Saver(Location(f"{folder}/{variant}/{LAYOUTS.index(layout)}"), spec.Checkpoint(every=1), group)
        saver.save(TRAINED, sharded_state.of(engine).tensors(), build_index.facts(optimizer_steps=sharded_state.of(engine).steps))
        saver.wait()
        names = sorted({name.partition(".")[0] for name in checkpoint.open_checkpoint(saver.run, TRAINED).index.tensors})
        state = play.state(engine)
        if dist.get_rank() == 0:
            save_file(state, f"{folder}/{variant}/{LAYOUTS.index(layout)}.safetensors")
        average = ema.of(made, engine)
        with average.applied() if average else nullcontext():
            kind = "ema" if average else "master"
            shown = all(torch.equal(p, state[f"{kind}.{name}"]) for name, p in play.masters(engine).items())
        back = all(torch.equal(tensor, state[name]) for name, tensor in play.state(engine).items())
        kept[variant, layout] = {"losses": losses + _play(engine, TRAINED, AFTER), "names": names, "bytes": _held(engine)}
        kept[variant, layout] |= {"shown": shown, "back": back}
    everyone.wait(ranks.DEADLINE_S)
    for variant, layout in cases:
        own = LAYOUTS.index(layout)
        told = {"variant": variant, "layout": own, **kept[variant, layout]}
        engine = deepspeed_engine.build_engine(_job(variant, layout), Around(Model))
        told |= {"next": {}, "unequal": []}
        for saved in range(len(LAYOUTS)) if variant in EVERY_PAIR else {own, _other(own)}:
            _load(Location(f"{folder}/{variant}/{saved}"), engine, group)
            expected, held = load_file(f"{folder}/{variant}/{saved}.safetensors"), play.state(engine)
            told["unequal"] += [f"{n} of {saved}" for n in expected | held if not torch.equal(expected[n], held[n])]
            steps = sharded_state.of(engine).steps
            told["next"][saved] = _play(engine, TRAINED, AFTER if saved in (own, _other(own)) else 1)
            told["steps"] = [steps, steps + len(told["next"][saved]) - sharded_state.of(engine).steps]
        yield told


Told = dict[Layout, list[dict[str, Any]]]  # one a rank


@pytest.fixture(scope="module")
def everything(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    variants, found = selection.asked(request, "variant"), dict[str, Told]()
    for row in ranks.run(f"{__name__}:grid", WORKERS, str(tmp_path_factory.mktemp("optimizers")), *variants):
        found.setdefault(row["variant"], {}).setdefault(LAYOUTS[row["layout"]], []).append(row)
    assert set(found) == set(variants) and all(set(told) == set(LAYOUTS) for told in found.values())
    return found


@pytest.fixture
def told(variant: str, everything: dict[str, Told]) -> Told:
    return everything[variant]


@OPTIMIZERS
def test_every_optimizer_trains_as_torch_alone_at_every_stage(variant: str, told: Told) -> None:
    """With decay of matrices and none of vectors, for any wrapper of DeepSpeed around the optimizer."""
    plain = _plain(variant)
    assert max(plain) > 1.05 * min(plain), "it does learn"
    for layout in LAYOUTS:
        tolerance = 1e-5 if layout.precision == "fp32" else 2e-2
        assert told[layout][0]["losses"] == pytest.approx(plain, rel=tolerance), layout


@OPTIMIZERS
def test_a_resumed_run_takes_the_same_steps_bit_by_bit(variant: str, told: Told) -> None:
    """In the configuration that saved, the moments, master weights, and step counts equal the saved ones."""
    for layout, rows in told.items():
        assert rows[0]["next"][str(LAYOUTS.index(layout))] == rows[0]["losses"][TRAINED:], layout
        assert rows[0]["steps"] == [TRAINED, 0], layout


@OPTIMIZERS
def test_a_checkpoint_of_another_layout_holds_the_same_state_and_takes_the_same_steps(variant: str, told: Told) -> None:
    """With other workers, stages, and precisions: the state bit by bit, and the steps within rounding."""
    for layout, rows in told.items():
        assert len(rows[0]["next"]) == (len(LAYOUTS) if variant in EVERY_PAIR else 2) and rows[0]["unequal"] == []
        for saved, losses in rows[0]["next"].items():
            there = LAYOUTS[int(saved)]
            tolerance = 1e-5 if layout.precision == there.precision == "fp32" else 2e-2
            expected = told[there][0]["losses"][TRAINED:][: len(losses)]
            assert losses == pytest.approx(expected, rel=tolerance), (layout, there)


@OPTIMIZERS
def test_an_average_that_the_optimizer_keeps_is_shown_to_evaluations_and_put_back(variant: str, told: Told) -> None:
    """In every configuration, to the last bit. The following steps are the same (above)."""
    assert all(row["shown"] and row["back"] for rows in told.values() for row in rows)


FP32 = [layout for layout in LAYOUTS if layout.precision == "fp32"]
DECAY, LAST, LENGTHS = 0.9, TRAINED + 1, [0.2, 0.25]


def averages(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In every rank, each configuration trains with an average and saves. Another configuration loads that, saves it again, and
    continues."""
    mine = {number: layout for number, layout in enumerate(FP32) if layout.workers == dist.get_world_size()}

    def begin(layout: Layout) -> tuple[Any, ema.AveragedWeights]:
        engine = deepspeed_engine.build_engine(_job("adamw", layout), Around(Model))
        return engine, ema.AveragedWeights(engine, Ema(decay=DECAY, lengths=LENGTHS))

    def save(name: str, step: int, engine: Any, average: ema.AveragedWeights) -> None:
        saver = checkpoint.Saver(Location(f"{folder}/{name}"), spec.Checkpoint(every=1), group)
        saver.save(step, sharded_state.of(engine).tensors() | average.state(), build_index.facts(optimizer_steps=step))
        saver.wait()

    for number, layout in mine.items():
        engine, average = begin(layout)
        for step in range(TRAINED):
            _play(engine, step, 1)
            average.update(step + 1)
        save(f"first-{number}", TRAINED, engine, average)
    everyone.wait(ranks.DEADLINE_S)
    for number, layout in mine.items():
        engine, average = begin(layout)
        state = sharded_state.of(engine).tensors(whole=True) | average.state(whole=True)
        for tensor in state.values():
            getattr(tensor, "local", tensor).fill_(float("nan"))
        other = (number + 3) % len(FP32)  # of another stage and of another number of workers
        checkpoint.load(checkpoint.open_checkpoint(Location(f"{folder}/first-{other}"), TRAINED), state, group)
        sharded_state.of(engine).after_load(TRAINED)
        save(f"again-{other}", TRAINED, engine, average)
        _play(engine, TRAINED, 1)
        average.update(LAST)
        save(f"last-{other}", LAST, engine, average)
        yield {"layout": number}


@pytest.mark.ci
def test_averages_are_those_of_torch_alone_at_every_stage_and_go_on_at_any_other(tmp_path) -> None:
    """`train.ema`, with `decay` and `lengths`, on one and two workers. After a load at another stage and number of workers, the
    averages are the same to the last bit."""
    assert len(ranks.run(f"{__name__}:averages", WORKERS, str(tmp_path))) == sum(layout.workers for layout in FP32)
    made = _job("adamw", FP32[0])
    torch.manual_seed(made.train.seed)
    model = Model()
    optimizer = made.train.optimizer.build(building.parameter_groups(model, 0.5, Around(Model)))
    expected, right = {n: p.detach().clone() for n, p in model.named_parameters()}, {}
    path: list[dict[str, torch.Tensor]] = []
    for step in range(1, LAST + 1):
        model(_data(step - 1)[:, :8], _data(step - 1)[:, 8:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            expected[name] += (p.detach() - expected[name]) * (1 - min(DECAY, (1 + step) / (10 + step)))
        path.append({name: p.detach().flatten().double() for name, p in model.named_parameters()})
        right[step] = {f"ema.{name}": average.flatten().clone() for name, average in expected.items()}
        for length in LENGTHS:
            weights = profile(length, step)
            for name in expected:
                average = sum(w * weight[name] for w, weight in zip(weights, path, strict=True))
                right[step][f"{power_averages.kind(length)}.{name}"] = torch.as_tensor(average).float()
    for number, layout in enumerate(FP32):
        kinds = {"first": TRAINED, "again": TRAINED, "last": LAST}
        first, again, last = (checkpoint.open_checkpoint(Location(f"{tmp_path}/{k}-{number}"), at) for k, at in kinds.items())
        assert sorted(first.names("ema")) == sorted(expected), layout
        for name in right[LAST]:
            assert torch.equal(first.read(name), again.read(name)), (layout, name)
            assert torch.allclose(first.read(name), right[TRAINED][name], atol=1e-5), (layout, name)
            assert torch.allclose(last.read(name), right[LAST][name], atol=1e-5), (layout, name)
    for kind in ("ema", "ema-200", "ema-250"):
        far = [(right[LAST][f"{kind}.{n}"] - p.detach().flatten()).abs().max() for n, p in model.named_parameters()]
        assert max(far) > 1e-3, kind


def exchange(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """In every rank, exchanges matrices of several shapes, split at any place. Some ranks have nothing of a matrix."""
    rank, world = dist.get_rank(), dist.get_world_size()
    random = np.random.default_rng(7)
    wholes, matrices, mine, offset = [], [], [], 0
    for rows, columns in [(5, 7), (1, 3), (8, 2), (6, 6), (2, 9), (3, 3)]:
        cuts = [0, *sorted(random.integers(0, rows * columns + 1, world - 1).tolist()), rows * columns]
        spans = tuple((a, b - a) for a, b in itertools.pairwise(cuts))
        wholes.append(torch.tensor(random.standard_normal((rows, columns))).float())
        matrices.append(Matrix(rows, columns, spans, offset))
        mine.append(wholes[-1].view(-1)[cuts[rank] : cuts[rank + 1]])
        offset += spans[rank][1]
    flat = torch.cat(mine)
    whole_matrices.BATCH = 24  # so that there are several exchanges
    whole_matrices.on_whole(lambda m: torch.linalg.pinv(m).T, flat, matrices, torch.device("cpu"))
    right = [
        torch.linalg.pinv(w).T.reshape(-1)[m.spans[rank][0] :][: m.spans[rank][1]] for w, m in zip(wholes, matrices, strict=True)
    ]
    yield {"batches": len(list(whole_matrices.batches(matrices, world))), "equal": torch.equal(flat, torch.cat(right))}


def test_what_is_computed_of_whole_matrices_does_not_depend_on_how_they_are_cut() -> None:
    """Bit by bit, on one to three workers, in several exchanges."""
    told = ranks.run(f"{__name__}:exchange", (1, 2, 3))
    assert len(told) == 6 and all(row["equal"] and row["batches"] > 1 for row in told), told


@OPTIMIZERS
def test_checkpoints_hold_and_the_plan_counts_what_the_optimizer_keeps(variant: str, told: Told) -> None:
    """The names in every checkpoint, and the bytes on every rank, which don't exceed the plan's either."""
    shapes = {name: tuple(p.shape) for name, p in Model().named_parameters()}
    hidden = building.hidden_matrices(Around(Model), Model())
    for layout, rows in told.items():
        settings = _job(variant, layout).train.optimizer
        kept = {name: len(settings.kept(name in hidden)) for name in shapes}
        planned = memory.state(shapes, frozenset(), layout.workers, layout.stage, layout.precision, moments=kept).moments
        for row in rows:
            assert row["names"] == sorted(["master", *settings.state]) and row["bytes"] == planned, layout
