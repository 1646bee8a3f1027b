"""The optimizers that a job may name: their keys, what they keep, and that ZeRO may step slices of parameters apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from heliostat.config import schema, spec
from heliostat.config.optimizers import REFUSED, REGISTRY, STATE_BYTES, AdamW, Optimizer
from heliostat.errors import ConfigError
from heliostat.plan import memory
from heliostat.plan.dryrun import kinds

from tests.unit.build_job import job, raw

LR = 0.01
SETTINGS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": LR},
    {"name": "sgd", "lr": LR, "weight_decay": 0.1},
    {"name": "sgd", "lr": LR, "momentum": 0.0, "weight_decay": 0.1},
    {"name": "sgd", "lr": LR, "nesterov": True, "weight_decay": 0.1},
    {"name": "rmsprop", "lr": LR, "weight_decay": 0.1},
]
STATE = [("exp_avg", "exp_avg_sq"), ("momentum_buffer",), (), ("momentum_buffer",), ("square_avg",)]


def optimizer(**keys: Any) -> Optimizer:
    return job(**{"train.optimizer": keys}).train.optimizer


def fault(**keys: Any) -> str:
    with pytest.raises(ConfigError) as e:
        optimizer(**keys)
    return str(e.value)


def stepped(made: torch.optim.Optimizer, parts: list[torch.Tensor], cut: int, steps: int = 5) -> torch.Tensor:
    """The parameter [6, 4], held as parts of its flat form that begin with `cut` elements, after some steps."""
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


@pytest.mark.parametrize(("keys", "state"), zip(SETTINGS, STATE, strict=True))
def test_an_optimizer_keeps_what_its_class_says(keys, state):
    """Of the parameter's shape, in fp32; and to begin with zeros is to begin as torch does, to the last bit."""
    settings = optimizer(**keys)
    whole = torch.nn.Parameter(parameter().view(6, 4))
    lazy = settings.build([{"params": [whole], "weight_decay": settings.weight_decay}])
    expected = stepped(lazy, [whole], 24)
    tensors = {k: v for k, v in lazy.state[whole].items() if torch.is_tensor(v) and v.shape == whole.shape}
    assert settings.state == state and set(tensors) == set(state)
    assert all(t.element_size() == STATE_BYTES for t in tensors.values())
    again = torch.nn.Parameter(parameter().view(6, 4))
    made = settings.build([{"params": [again], "weight_decay": settings.weight_decay}])
    made.state[again] = {"step": torch.zeros(()), **{k: torch.zeros_like(again) for k in state}}
    assert torch.equal(stepped(made, [again], 24), expected)


def apart(build: Any) -> float:
    """How far the parameter, stepped whole, is from two flat slices of it, stepped apart: as ZeRO cuts it."""
    whole = torch.nn.Parameter(parameter().view(6, 4))
    slices = [torch.nn.Parameter(part.clone()) for part in parameter().split([7, 17])]
    one = stepped(build([{"params": [whole]}]), [whole], 24)
    return float((one - stepped(build([{"params": slices}]), slices, 7)).abs().max())


@pytest.mark.parametrize("keys", SETTINGS)
def test_slices_of_a_parameter_are_stepped_as_the_whole(keys):
    assert apart(optimizer(**keys).build) < 1e-6


def test_what_looks_at_whole_matrices_is_told_from_what_does_not():
    """And is refused by name, with the reason."""
    assert apart(lambda groups: torch.optim.Adafactor(groups, lr=LR)) > 1e-3
    for name in REFUSED:
        message = fault(name=name, lr=LR)
        assert message == f"job.yaml: train.optimizer: name {name!r} {REFUSED[name]}; use one of {', '.join(REGISTRY)}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "adamW", "lr": LR}, "train.optimizer.name: 'adamW' is not a choice; did you mean 'adamw'?"),
        ({"name": "lion", "lr": LR}, "train.optimizer.name: 'lion' is not a choice; valid: adamw, rmsprop, sgd"),
        ({"name": 5, "lr": LR}, "train.optimizer.name: 5 is not a choice; valid: adamw, rmsprop, sgd"),
        ({"name": None, "lr": LR}, "train.optimizer.name: None is not a choice; valid: adamw, rmsprop, sgd"),
        ({"name": "sgd"}, "train.optimizer.lr: is required"),
        ({"name": "sgd", "lr": LR, "betas": [0.9, 0.95]}, "train.optimizer.betas: unknown key; valid: lr, momentum, name, "),
        ({"name": "sgd", "lr": LR, "momentun": 0.1}, "train.optimizer.momentun: unknown key; did you mean 'momentum'?"),
        ({"name": "sgd", "lr": LR, "momentum": 1}, "train.optimizer.momentum: 1 should be less than 1"),
        ({"name": "sgd", "lr": LR, "momentum": 0.0, "nesterov": True}, "train.optimizer: nesterov: true needs momentum; "),
        ({"lr": LR, "momentum": 0.9}, "train.optimizer.momentum: unknown key; "),
        ({"name": "rmsprop", "lr": LR, "eps": 0}, "train.optimizer.eps: 0 should be greater than 0"),
    ],
)
def test_keys_are_those_of_the_named_optimizer(keys, message):
    """One line with the key as the file has it; without a name it is AdamW."""
    assert fault(**keys).startswith(f"job.yaml: {message}")


def test_jobs_recorded_before_there_were_others_are_adamws():
    """Without a name or with it; and a recorded job of every optimizer is read as it was."""
    recorded = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    found = optimizer(**recorded)
    assert isinstance(found, AdamW) and json.loads(found.model_dump_json()) == {"name": "adamw", **recorded}
    for keys in SETTINGS:
        made = job(**{"train.optimizer": keys})
        assert schema.validate(spec.Job, made.dump(), "dump") == made and type(made.train.optimizer) is REGISTRY[keys["name"]]


@pytest.mark.parametrize(("keys", "state"), zip(SETTINGS, STATE, strict=True))
@pytest.mark.parametrize(("recorded", "held"), zip(SETTINGS, STATE, strict=True))
def test_a_run_goes_on_with_an_optimizer_that_keeps_what_its_checkpoints_hold(keys, state, recorded, held):
    """Rates, decay and the like may change; what is kept of parameters may not."""
    made = job(**{"train.optimizer": keys})
    if state == held:
        assert spec.settle(made, raw(**{"train.optimizer": recorded})).train.optimizer == made.train.optimizer
        return
    with pytest.raises(ConfigError, match=rf"^train\.optimizer: {keys['name']!r} keeps .* made with {recorded['name']!r}, hold "):
        spec.settle(made, raw(**{"train.optimizer": recorded}))


def test_a_run_of_an_optimizer_from_later_versions_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"made with 'muon', hold what this heliostat does not know; "):
        spec.settle(job(), raw(**{"train.optimizer": {"name": "muon", "lr": 1}}))


@pytest.mark.parametrize(("keys", "state"), zip(SETTINGS, STATE, strict=True))
def test_the_plan_counts_what_the_optimizer_keeps(keys, state):
    """Bytes of a worker, and the names and bytes of a checkpoint."""
    made = job(**{"train.optimizer": keys})
    assert kinds(made) == ["master", *state]
    for stage in range(4):
        held = memory.state({"w": (64, 8)}, frozenset(), 2, stage, "fp32", moments=len(state))
        assert held.moments == 4 * len(state) * 512 // (2 if stage else 1)


def test_reading_a_job_imports_no_torch():
    code = "import sys, heliostat.config.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
