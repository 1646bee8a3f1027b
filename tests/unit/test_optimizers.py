"""Tests the optimizers that a job may name: their keys, their state, and that ZeRO may step slices of parameters separately."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from heliostat import schema
from heliostat.config import spec
from heliostat.config.train_section import GROWING
from heliostat.errors import ConfigError
from heliostat.optim.optimizers import REFUSED, REGISTRY, STATE_BYTES, AdamW, Optimizer
from heliostat.optim.whole_matrices import BATCH, Matrix, batches
from heliostat.plan import memory
from heliostat.plan.dryrun import kinds
from heliostat.recipes import CausalLM, building
from heliostat.recipes.protocol import Group

from tests.unit.build_job import job, raw

LR = 0.01
SETTINGS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": LR},
    {"name": "sgd", "lr": LR, "weight_decay": 0.1},
    {"name": "sgd", "lr": LR, "momentum": 0.0, "weight_decay": 0.1},
    {"name": "sgd", "lr": LR, "nesterov": True, "weight_decay": 0.1},
    {"name": "rmsprop", "lr": LR, "weight_decay": 0.1},
    {"name": "lion", "lr": LR},
    {"name": "schedule_free", "lr": LR},
    {"name": "muon", "lr": LR},
]
STATE = [("exp_avg", "exp_avg_sq"), ("momentum_buffer",), (), ("momentum_buffer",), ("square_avg",), ("exp_avg",),
         ("exp_avg_sq", "z", "ema"), ("momentum_buffer", "exp_avg", "exp_avg_sq")]  # fmt: skip


def changed(keys: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of a job that name the optimizer, with a valid schedule."""
    return {"train.optimizer": keys} | ({"train.schedule.name": "constant"} if keys.get("name") == "schedule_free" else {})


def optimizer(**keys: Any) -> Optimizer:
    return job(**changed(keys)).train.optimizer


def groups(settings: Optimizer, parts: list[torch.Tensor], hidden: bool = False) -> list[dict[str, Any]]:
    apart = {"orthogonal": hidden} if settings.orthogonalizes else {}
    return [{"params": parts, "weight_decay": settings.weight_decay, **apart}]


def fault(**keys: Any) -> str:
    with pytest.raises(ConfigError) as e:
        optimizer(**keys)
    return str(e.value)


def stepped(made: torch.optim.Optimizer, parts: list[torch.Tensor], cut: int, steps: int = 5) -> torch.Tensor:
    """Returns the parameter [6, 4] after some steps, with its flat form split after `cut` elements."""
    for step in range(steps):
        gradient = torch.randn(24, generator=torch.Generator().manual_seed(step))
        for part, its in zip(parts, (gradient[:cut], gradient[cut:]), strict=False):
            part.grad = its.reshape(part.shape).clone()
        made.step()
    return torch.cat([part.detach().flatten() for part in parts])


def parameter() -> torch.Tensor:
    return torch.linspace(-1, 1, 24)


def test_every_registered_optimizer_is_tried_here_and_in_the_grid_of_engines():
    from tests.integration.test_optimizers import VARIANTS

    assert {s["name"] for s in SETTINGS} == set(REGISTRY) == {v["name"] for v in VARIANTS.values()}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("keys", "state"), zip(SETTINGS, STATE, strict=True))
def test_an_optimizer_keeps_what_its_class_says(keys, state, hidden):
    """The state has the parameter's shape, in fp32. Its initial value equals that of a single process, to the last bit."""
    settings = optimizer(**keys)
    whole = torch.nn.Parameter(parameter().view(6, 4))
    lazy = settings.build(groups(settings, [whole], hidden))
    expected = stepped(lazy, [whole], 24)
    tensors = {k: v for k, v in lazy.state[whole].items() if torch.is_tensor(v) and v.shape == whole.shape}
    assert settings.state == state and set(tensors) == set(settings.kept(hidden)) <= set(state)
    assert all(t.element_size() == STATE_BYTES for t in tensors.values())
    again = torch.nn.Parameter(parameter().view(6, 4))
    made = settings.build(groups(settings, [again], hidden))
    begun = {k: again.detach().clone() if k in settings.copies else torch.zeros_like(again) for k in tensors}
    made.state[again] = {"step": torch.zeros(()), **begun}
    assert torch.equal(stepped(made, [again], 24), expected)


def apart(build: Any) -> float:
    """Returns the distance between the parameter stepped whole, and stepped as two flat slices, as ZeRO splits it."""
    whole = torch.nn.Parameter(parameter().view(6, 4))
    slices = [torch.nn.Parameter(part.clone()) for part in parameter().split([7, 17])]
    one = stepped(build([{"params": [whole]}]), [whole], 24)
    return float((one - stepped(build([{"params": slices}]), slices, 7)).abs().max())


@pytest.mark.parametrize("keys", SETTINGS)
def test_slices_of_a_parameter_are_stepped_as_the_whole(keys):
    """For Muon, only parameters that aren't hidden matrices. The integration tests cover hidden matrices."""
    settings = optimizer(**keys)
    assert apart(lambda given: settings.build(groups(settings, given[0]["params"]))) < 1e-6


def test_muon_is_torchs_own_and_its_others_are_adamws():
    """With bf16 and either scale, bit by bit. A stack of experts' matrices is stepped like single matrices."""
    for scale, theirs in (("adamw", "match_rms_adamw"), ("spectral", "original")):
        settings = optimizer(name="muon", lr=LR, adamw_lr=LR / 2, scale=scale, newton_schulz="bf16", weight_decay=0.1)
        ours, reference = (torch.nn.Parameter(parameter().view(6, 4)) for _ in range(2))
        vector, its = (torch.nn.Parameter(parameter()) for _ in range(2))
        made = settings.build([*groups(settings, [ours], True), *groups(settings, [vector])])
        assert [g.get("lr_scale", 1.0) for g in made.param_groups] == [1.0, 0.5]
        for g in made.param_groups:
            g["lr"] = LR * g.get("lr_scale", 1.0)
        matrix = torch.optim.Muon([reference], lr=LR, weight_decay=0.1, adjust_lr_fn=theirs)
        rest = torch.optim.AdamW([its], lr=LR / 2, betas=(0.9, 0.95), weight_decay=0.1)
        gradient = torch.randn(24, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            ours.grad, reference.grad = gradient.view(6, 4).clone(), gradient.view(6, 4).clone()
            vector.grad, its.grad = gradient.clone(), gradient.clone()
            for one in (made, matrix, rest):
                one.step()
        assert torch.allclose(ours, reference, rtol=0, atol=1e-7) and torch.allclose(vector, its, atol=1e-7)
        assert (ours - parameter().view(6, 4)).abs().max() > 1e-4
    experts = torch.nn.Parameter(torch.stack([parameter().view(6, 4)] * 2))
    one = torch.nn.Parameter(parameter().view(6, 4))
    settings = optimizer(name="muon", lr=LR)
    experts.grad, one.grad = torch.stack([gradient.view(6, 4)] * 2), gradient.view(6, 4).clone()
    for p in (experts, one):
        settings.build(groups(settings, [p], True)).step()
    assert torch.allclose(experts[1], one, atol=1e-7)


def test_lion_and_schedule_free_follow_their_papers():
    """Lion follows its three lines. The average of Schedule-Free is that of its iterates, weighted by the squared rates."""
    p, m, w = torch.nn.Parameter(parameter()), torch.zeros(24), parameter()
    lion = optimizer(name="lion", lr=LR, weight_decay=0.3)
    made = lion.build(groups(lion, [p]))
    for step in range(3):
        g = torch.randn(24, generator=torch.Generator().manual_seed(step))
        w = w - LR * ((0.9 * m + 0.1 * g).sign() + 0.3 * w)
        m = 0.99 * m + 0.01 * g
    assert torch.allclose(stepped(made, [p], 24, 3), w, atol=1e-6)
    free = optimizer(name="schedule_free", lr=LR)
    made = free.build([{**groups(free, [p])[0], "warmup": 3}])
    iterates, rates = [], [min(1.0, k / 3) for k in range(1, 7)]
    for k, rate in enumerate(rates):
        made.param_groups[0]["lr"] = LR * rate
        p.grad = torch.randn(24, generator=torch.Generator().manual_seed(k))
        made.step()
        iterates.append(made.state[p]["z"].clone())
    average = sum(z * r**2 for z, r in zip(iterates, rates, strict=True)) / sum(r**2 for r in rates)
    assert torch.allclose(made.state[p]["ema"], average, atol=1e-6) and not torch.allclose(average, iterates[-1], atol=1e-3)
    assert torch.allclose(p, 0.1 * iterates[-1] + 0.9 * average, atol=1e-6)


def test_an_average_in_the_optimizer_takes_the_place_of_a_schedule_and_of_another_average():
    with pytest.raises(
        ConfigError, match=r"train\.schedule\.name: 'cosine' isn't supported with optimizer 'schedule_free', .*\. Use constant"
    ):
        job(**{"train.optimizer": {"name": "schedule_free", "lr": LR}})
    with pytest.raises(ConfigError, match=r"train\.ema: optimizer 'schedule_free' keeps an average .*\. Remove train\.ema"):
        job(**changed({"name": "schedule_free", "lr": LR}), **{"train.ema": {}})


@pytest.mark.parametrize("key", GROWING)
def test_batches_and_samples_that_grow_are_refused_by_name(key):
    with pytest.raises(
        ConfigError, match=rf"^job\.yaml: train: {key} isn't supported: every .*\. Remove this key, and use train\."
    ):
        job(**{f"train.{key}": 100})


def test_matrices_are_dealt_to_workers_and_every_one_travels_once():
    deal = [Matrix(4, n, ((0, 4 * n),), 0) for n in (8, 1, 2, 3, 2)]
    ((batch),) = list(batches(deal, 2))
    assert [m for m, _ in batch] == deal and [owner for _, owner in batch] == [0, 1, 1, 1, 1]
    large = [Matrix(BATCH // 4, 5, ((0, 0),), 0)] * 3
    assert [len(b) for b in batches(large, 1)] == [1, 1, 1] and [len(b) for b in batches(large, 3)] == [2, 1]


def test_hidden_matrices_are_those_between_embedding_and_head():
    """For a model of transformers. A recipe's choice overrides that of its modules, and must name a matrix."""
    recipe = CausalLM(job())
    recipe.vocab_size = 96
    model = recipe.build()
    found = building.hidden_matrices(recipe, model)
    assert found == {n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n}
    assert len(found) > 10
    recipe.group = lambda name, shape: Group(hidden=name.endswith("embed_tokens.weight"))
    assert building.hidden_matrices(recipe, model) == {"model.embed_tokens.weight"}
    recipe.group = lambda name, shape: Group(hidden=True)
    with pytest.raises(ConfigError, match=r"CausalLM\.group sets `hidden` for '.*norm.*', but this parameter isn't a matrix"):
        building.hidden_matrices(recipe, model)


def test_what_looks_at_whole_matrices_is_told_from_what_does_not():
    """It is rejected by name, with the reason."""
    assert apart(lambda groups: torch.optim.Adafactor(groups, lr=LR)) > 1e-3
    for name in REFUSED:
        message = fault(name=name, lr=LR)
        assert message == f"job.yaml: train.optimizer: name: {name!r} {REFUSED[name]}. Use one of {', '.join(REGISTRY)}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "adamW", "lr": LR}, "train.optimizer.name: 'adamW' isn't a choice. Did you mean 'adamw'?"),
        (
            {"name": "tiger", "lr": LR},
            "train.optimizer.name: 'tiger' isn't a choice. Use one of: adamw, lion, muon, rmsprop, schedule_free, sgd",
        ),
        (
            {"name": 5, "lr": LR},
            "train.optimizer.name: 5 isn't a choice. Use one of: adamw, lion, muon, rmsprop, schedule_free, sgd",
        ),
        (
            {"name": None, "lr": LR},
            "train.optimizer.name: None isn't a choice. Use one of: adamw, lion, muon, rmsprop, schedule_free, sgd",
        ),
        ({"name": "sgd"}, "train.optimizer.lr: required key missing. Write train.optimizer.lr: NUMBER"),
        ({"name": "sgd", "lr": LR, "betas": [0.9, 0.95]}, "train.optimizer.betas: unknown key. Use one of: lr, momentum, name, "),
        ({"name": "sgd", "lr": LR, "momentun": 0.1}, "train.optimizer.momentun: unknown key. Did you mean 'momentum'?"),
        ({"name": "sgd", "lr": LR, "momentum": 1}, "train.optimizer.momentum: 1 is too large. Use a number below 1"),
        (
            {"name": "sgd", "lr": LR, "momentum": 0.0, "nesterov": True},
            "train.optimizer: nesterov: true needs momentum. Set momentum above 0, or nesterov to false",
        ),
        ({"lr": LR, "momentum": 0.9}, "train.optimizer.momentum: unknown key. Use one of: "),
        ({"name": "rmsprop", "lr": LR, "eps": 0}, "train.optimizer.eps: 0 is too small. Use a number above 0"),
    ],
)
def test_keys_are_those_of_the_named_optimizer(keys, message):
    """One line has the key as in the file. Without a name, the optimizer is AdamW."""
    assert fault(**keys).startswith(f"job.yaml: {message}")


def test_jobs_recorded_before_there_were_others_are_adamws():
    """With or without a name. A recorded job with any optimizer is read unchanged."""
    recorded = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    found = optimizer(**recorded)
    assert isinstance(found, AdamW) and json.loads(found.model_dump_json()) == {"name": "adamw", **recorded}
    for keys in SETTINGS:
        made = job(**changed(keys))
        assert schema.validate(spec.Job, made.dump(), "dump") == made and type(made.train.optimizer) is REGISTRY[keys["name"]]


@pytest.mark.parametrize(("keys", "state"), zip(SETTINGS, STATE, strict=True))
@pytest.mark.parametrize(("recorded", "held"), zip(SETTINGS, STATE, strict=True))
def test_a_run_goes_on_with_an_optimizer_that_keeps_what_its_checkpoints_hold(keys, state, recorded, held):
    """Rates, decay, and similar keys may change, but not the kind of state per parameter."""
    made = job(**changed(keys))
    if state == held:
        assert spec.settle(made, raw(**changed(recorded))).train.optimizer == made.train.optimizer
        return
    name, before = keys["name"], recorded["name"]
    holds = (
        rf"the run's checkpoints \({before!r}\) contain {', '.join(held) or 'nothing'}\. Set train\.optimizer\.name to {before!r}"
    )
    with pytest.raises(ConfigError, match=rf"^train\.optimizer: {name!r} keeps .* per parameter, but {holds}"):
        spec.settle(made, raw(**changed(recorded)))


def test_a_run_of_an_optimizer_from_later_versions_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"\('adam9'\) contain state that this version of heliostat doesn't know\. "):
        spec.settle(job(), raw(**{"train.optimizer": {"name": "adam9", "lr": 1}}))


@pytest.mark.parametrize(("keys", "state"), zip(SETTINGS, STATE, strict=True))
def test_the_plan_counts_what_the_optimizer_keeps(keys, state):
    """The plan has the bytes of a worker, and the names and bytes of a checkpoint."""
    made = job(**changed(keys))
    settings, shapes = made.train.optimizer, {"w": (64, 8), "b": (8,)}
    kept = [settings.kept(True), settings.kept(False)]
    assert [kinds(made, hidden) for hidden in (True, False)] == [["master", *names] for names in kept]
    assert set(kept[0]) | set(kept[1]) == set(state)
    for stage in range(4):
        held = memory.state(shapes, frozenset(), 2, stage, "fp32", moments={"w": len(kept[0]), "b": len(kept[1])})
        assert held.moments == 4 * (512 * len(kept[0]) + 8 * len(kept[1])) // (2 if stage else 1)


def test_reading_a_job_imports_no_torch():
    code = "import sys, heliostat.config.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
