"""Tests copies between host and device: their order, their moment, and their number. On a CPU, they are plain copies."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from heliostat.data import device_streams
from heliostat.data.device_streams import HostTensors, LateRead, pinned, upload

CPU = torch.device("cpu")


def test_values_are_those_of_the_moment_when_their_copy_was_queued():
    norm = torch.tensor(2.5, requires_grad=True)
    late = LateRead(norm)
    with torch.no_grad():
        norm.fill_(7.0)
    assert float(late.values()) == 2.5


def test_nothing_is_copied_on_a_cpu():
    values = torch.ones(3)
    assert pinned(values, CPU) is values and upload(values, CPU) is values


class Chain(torch.nn.Module):
    """Defines layers whose inputs are saved."""

    def forward(self, x: torch.Tensor, host: Any) -> torch.Tensor:
        for _ in range(3):
            with host:
                x = x.sin()
        return x.sum()


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Returns the fetched and restored tensors in order, by value."""
    seen: list[tuple[str, float]] = []
    for name in ("fetch", "restore"):
        does = getattr(device_streams._Saved, name)

        def spied(self: Any, name: str = name, does: Any = does) -> Any:
            seen.append((name, round(float(self._host), 3)))
            return does(self)

        monkeypatch.setattr(device_streams._Saved, name, spied)
    return seen


def test_tensors_return_with_their_bits_and_each_ones_copy_begins_with_the_use_of_the_next(order):
    x, host = torch.tensor(0.5, requires_grad=True), HostTensors()
    Chain()(x, host).backward()
    plain = torch.tensor(0.5, requires_grad=True)
    Chain()(plain, nullcontext()).backward()
    assert torch.equal(x.grad, plain.grad)
    first, second, third = 0.5, 0.479, 0.461
    assert order == [
        ("restore", third), ("fetch", third), ("fetch", second),
        ("restore", second), ("fetch", second), ("fetch", first),
        ("restore", first), ("fetch", first),
    ]  # fmt: skip


def test_what_a_graph_has_saved_goes_with_it():
    host = HostTensors()
    loss = Chain()(torch.tensor(0.5, requires_grad=True), host)
    kept = weakref.ref(host._last())  # type: ignore[misc]
    assert kept() is not None
    del loss
    gc.collect()
    assert kept() is None


class Product(torch.autograd.Function):
    """Saves both factors. The backward pass needs the first factor first."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        a, b = ctx.saved_tensors
        return gradient * b, gradient * a


def test_what_was_brought_back_is_not_copied_again(order):
    a, b = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
    with HostTensors():
        made = Product.apply(a, b)
    made.backward()
    assert (a.grad, b.grad) == (3.0, 2.0)
    assert order == [("restore", 2.0), ("fetch", 2.0), ("restore", 3.0), ("fetch", 3.0)]
