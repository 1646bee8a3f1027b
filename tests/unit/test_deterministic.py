"""Tests that `train.sdc_check` compares deterministic kernels. Fused attention isn't deterministic, and ended the checks."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heliostat.recipes.protocol import Loss
from heliostat.training.worker import recheck
from heliostat.training.worker.recheck import CorruptionCheck
from torch import nn

WORKERS = 3
NOISE = torch.Generator().manual_seed(0)
seen: list[str | None] = []


def strict() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@torch.library.custom_op("heliotest::_flash_attention_forward", mutates_args=())
def attend(x: torch.Tensor) -> torch.Tensor:
    """Simulates a GPU's fused attention. It reads the environment, like flash-attn's in transformers."""
    seen.append(os.environ.get(recheck.FLASH))
    return 2 * x


@torch.library.custom_op("heliotest::_flash_attention_backward", mutates_args=())
def attend_backward(upstream: torch.Tensor) -> torch.Tensor:
    """Sums in any order, unless torch is set to deterministic algorithms (not only to warnings)."""
    seen.append(os.environ.get(recheck.FLASH))
    return 2 * upstream * (1 if strict() else 1 + 2**-20 * torch.rand((), generator=NOISE))


attend.register_autograd(lambda ctx, upstream: attend_backward(upstream))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(attend(self.first(x)))


def checking(monkeypatch: pytest.MonkeyPatch, model: nn.Module, compiled: bool = False) -> CorruptionCheck:
    """Returns a check by three workers, which compute one after another."""
    made: Any = object.__new__(CorruptionCheck)
    made.engine = SimpleNamespace(module=model, device=torch.device("cpu"))
    made.recipe = SimpleNamespace(loss=lambda module, batch: Loss(module(batch["x"]).square().sum()))
    made.every, made.agreed, made.whole, made.group, made.compiled = 2, 0, True, None, compiled
    made.where, made.kind = ("node", "10.0.0.1"), "a GPU"
    monkeypatch.setattr(made, "_micro", lambda step: ({"x": torch.ones(4, 8)}, 0))
    monkeypatch.setattr(made, "_drawn", lambda step: made._trained())
    monkeypatch.setattr(recheck, "agreed", lambda group, work: work())
    monkeypatch.setattr(recheck, "together", lambda group, work: [work()])
    alone = made._all
    monkeypatch.setattr(made, "_all", lambda *given: [alone(*given)[0] for _ in range(WORKERS)])
    return made


def test_attention_that_is_not_deterministic_in_training_does_not_end_the_checks(monkeypatch):
    """Its backward pass obeys only the strict setting, like torch's flash and memory-efficient kernels."""
    found = checking(monkeypatch, Model())
    assert found.look(1) is None and found.every == 2 and found.agreed == 1
    seen.clear()
    assert found.look(3) is None and set(seen) == {"1"}


def test_kernels_that_are_never_deterministic_end_the_checks_as_before(monkeypatch):
    found = checking(monkeypatch, Model(), compiled=True)  # no mode, and so no strict request
    assert "train.sdc_check is off from now on" in str(found.look(1)) and found.off


def test_real_attention_has_gradients_inside_and_runs_under_the_strict_request(monkeypatch):
    called: list[tuple[str, bool]] = []
    run = recheck._StrictAttention.__torch_dispatch__

    def watched(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            called.append((func._schema.name, strict()))
            return func(*args, **kwargs)

        return run(self, type("Op", (), {"_schema": func._schema, "__call__": staticmethod(noted)})(), types, args, kwargs)

    monkeypatch.setattr(recheck._StrictAttention, "__torch_dispatch__", watched)
    x = torch.randn(1, 2, 16, 8, requires_grad=True)
    with recheck.kernels(compiled=False):
        made = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        (inside,) = torch.autograd.grad(made.square().sum(), x)
    made = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert torch.equal(torch.autograd.grad(made.square().sum(), x)[0], inside)
    attention = [name for name, is_strict in called if is_strict]
    assert any("backward" in name for name in attention) and all("scaled_dot_product" in name for name in attention)
    assert any(not is_strict for _, is_strict in called)


@pytest.mark.parametrize("before", [None, "0"])
def test_training_is_left_as_it_was_also_behind_an_error(before, monkeypatch):
    monkeypatch.delenv(recheck.FLASH, raising=False)
    if before is not None:
        monkeypatch.setenv(recheck.FLASH, before)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with pytest.raises(ZeroDivisionError), recheck.kernels(compiled=False):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        1 / 0  # noqa: B018
    assert os.environ.get(recheck.FLASH) == before and torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
