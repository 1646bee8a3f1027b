"""Tests the order of DeepSpeed's streams: which ones wait for sums, weights, and gathers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heliostat.engine import stream_patches


class Stream:
    """Simulates a stream, and records its calls."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"the host waits for {self.name}")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    noted: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("training", noted))
    return noted


def _zero_2(log: list[str], **changes: Any) -> Any:
    """Returns an optimizer of ZeRO-1 or 2 with an epilogue like DeepSpeed's."""
    zero = SimpleNamespace(overlap_comm=True, contiguous_gradients=True, cpu_offload=False, reduction_stream=Stream("sums", log))
    zero.reduce_ipg_grads = lambda: log.append("reduce")
    zero.independent_gradient_partition_epilogue = lambda: (
        zero.reduce_ipg_grads(),
        log.append("the host waits" if zero.overlap_comm else "sum up"),
    )
    vars(zero).update(changes)
    stream_patches.order_reductions(zero)
    return zero


def test_after_a_backward_pass_training_waits_for_the_sums_and_the_host_does_not(log):
    zero = _zero_2(log)
    for _ in range(2):
        zero.independent_gradient_partition_epilogue()
    assert log == ["reduce", "training waits for sums", "sum up"] * 2 and zero.overlap_comm


@pytest.mark.parametrize("changes", [{"cpu_offload": True}, {"contiguous_gradients": False}])
def test_the_host_waits_where_it_reads_the_sums_or_frees_gradients(changes, log):
    _zero_2(log, **changes).independent_gradient_partition_epilogue()
    assert log == ["reduce", "the host waits"]


@pytest.mark.parametrize(("offload", "right"), [(False, "training waits for sums"), (True, "the host waits for sums")])
def test_at_stage_3_the_host_waits_for_the_sums_only_if_it_reads_them(offload, right, log):
    zero = SimpleNamespace(reduce_and_partition_stream=Stream("sums", log), offload_optimizer=offload)
    stream_patches.order_reductions(zero)
    zero.reduce_and_partition_stream.synchronize()
    assert log == [right]


def test_gathers_wait_for_the_weights_that_a_step_writes(log):
    offload = SimpleNamespace(**{"_DeepSpeedZeRoOffload__allgather_stream": Stream("gathers", log)})
    zero = SimpleNamespace(parameter_offload=offload, step=lambda: log.append("step"))
    stream_patches.order_gathers(zero)
    zero.step()
    assert log == ["step", "gathers waits for training"]


def test_gathers_wait_for_the_weights_of_a_restore_and_on_a_cpu_for_nothing(log):
    for gathering in (Stream("gathers", log), None):
        offload = SimpleNamespace(**{"_DeepSpeedZeRoOffload__allgather_stream": gathering})
        stream_patches.gathers_wait(SimpleNamespace(parameter_offload=offload))
    assert log == ["gathers waits for training"]
