"""Tests that groups that shard the training state (`train.zero.shard_group_size`) make the same steps, or skip the same ones,
together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heliostat.engine import state_group
from heliostat.engine.state_group import StateGroup


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the calls of the other groups and of the GPU's streams, in order. There is one other group, whose gradients are 3
    and overflow."""
    found: list[str] = []

    def all_reduce(values: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None) -> None:
        found.append(f"{'sum' if op == torch.distributed.ReduceOp.SUM else 'most'} over {group}")
        values.add_(1.5) if op == torch.distributed.ReduceOp.SUM else values.clamp_(min=1)

    monkeypatch.setattr(state_group.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(state_group.dist, "get_global_rank", lambda group, rank: rank)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the training's")
    return found


def _joined(log: list[str], stream: Any) -> Any:
    """Returns an optimizer of DeepSpeed without an overflow of its own, which averages over two groups."""
    group: Any = StateGroup.__new__(StateGroup)
    group.count, group.across = 2, "groups"
    zero = SimpleNamespace(grad_partitions_flat_buffer=torch.ones(4), reduce_and_partition_stream=stream)
    zero.step = lambda: log.append("step")
    zero.has_overflow = lambda partition_gradients=True: False
    zero._get_norm_groups = lambda: []
    group.average(SimpleNamespace(optimizer=zero))
    return zero


def test_an_overflow_is_looked_for_in_the_averages_on_the_stream_that_has_waited_for_them(log: list[str]) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: log.append(f"the reduction's waits for {other}"))
    zero = _joined(log, stream)
    zero.step()
    assert log == ["sum over groups", "the reduction's waits for the training's", "step"]
    assert zero.grad_partitions_flat_buffer.tolist() == [2.0] * 4


def test_on_a_cpu_there_is_no_stream_to_wait_for(log: list[str]) -> None:
    _joined(log, None).step()
    assert log == ["sum over groups", "step"]


def test_a_group_skips_the_step_that_another_skips(log: list[str]) -> None:
    """If it continued alone, it would wait forever for the others' norms."""
    assert _joined(log, None).has_overflow(True) is True and log == ["most over groups"]
