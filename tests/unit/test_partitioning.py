"""Tests that callers of recipes and attention choose how models are partitioned and heads exchanged. Without a choice, nothing
happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heliostat.parallel import sequence_attention
from heliostat.recipes import partitioning
from heliostat.recipes.partitioning import assign


class Noting:
    """Records the calls of a partitioner."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @contextmanager
    def constructing(self) -> Iterator[None]:
        self.asked.append("constructing")
        yield

    @contextmanager
    def whole(self, parameter: torch.Tensor) -> Iterator[None]:
        self.asked.append("whole")
        whole, parameter.data = parameter.data, torch.zeros(2, 2)  # as one that is gathered
        yield
        self.held, parameter.data = parameter.data, whole


def test_a_model_is_built_through_the_partitioner_that_is_passed_in_and_only_then():
    noting, parameter = Noting(), torch.nn.Parameter(torch.empty(0))
    with partitioning.by(noting):
        assert partitioning.wanted()
        with partitioning.constructing():
            pass
        assign(parameter, torch.ones(2, 2))
    assert noting.asked == ["constructing", "whole"] and noting.held.eq(1).all() and parameter.numel() == 0
    assert not partitioning.wanted()
    with partitioning.constructing():
        pass
    plain = torch.nn.Parameter(torch.zeros(2))
    assign(plain, torch.ones(2))
    assert noting.asked == ["constructing", "whole"] and plain.eq(1).all()


def test_a_model_that_fails_to_build_leaves_no_partitioner():
    with pytest.raises(RuntimeError), partitioning.by(Noting()):
        raise RuntimeError
    assert not partitioning.wanted()


def test_heads_are_exchanged_as_the_engine_passes_in_and_without_it_is_one_error(monkeypatch):
    config = SimpleNamespace(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=32)
    config.get_text_config = lambda decoder: config
    model, given, installed = SimpleNamespace(config=config), list[Any](), list[Any]()
    monkeypatch.setattr(sequence_attention, "core", lambda model: "core")
    monkeypatch.setattr(sequence_attention, "install", lambda model, name, attention: installed.append((name, attention)))
    monkeypatch.setattr(sequence_attention.dist, "get_world_size", lambda group: 2)
    with pytest.raises(RuntimeError, match="no engine exchanges heads here"):
        sequence_attention.use(model, "group", 1, False)
    with sequence_attention.exchanging(lambda *asked: given.append(asked) or "exchanged"):
        sequence_attention.use(model, "group", 1, False)
    assert given == [("core", "group", 1, (4, 2, 8), 3)]
    (name, attention) = installed[0]
    assert name == "cut-2-1" and attention.exchanged == "exchanged"
