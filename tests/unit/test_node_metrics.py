"""Tests that the utilization of a node's GPUs is read without CUDA, and that a broken GPU doesn't stop the reading of the
others."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray._private.thirdparty.pynvml as bundled
import torch
from heliostat.runs.events import Event, NodeSample, Notice
from heliostat.training.worker import node_metrics
from heliostat.training.worker.node_metrics import NodeMonitor


class NVMLError(Exception): ...


class Nvml:
    """Simulates NVIDIA's bindings on a node with four GPUs. The third has fallen off the bus, and the second measures no
    power."""

    NVMLError = NVMLError

    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 2:
            raise NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        return {"GPU-b": 1, "GPU-d": 3}[name]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=(handle + 1) * 10**9, total=80 * 10**9)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=97)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle == 1:
            raise NVMLError("Not Supported")
        return 650_000


@pytest.fixture(autouse=True)
def node(monkeypatch):
    def context(*given: Any) -> Any:
        raise AssertionError("this creates a context on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("mem_get_info", "utilization", "power_draw", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, context)
    monkeypatch.setattr(node_metrics, "_nvml", Nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_are_read_without_a_context_and_a_lost_one_is_left_out():
    values, faults = node_metrics.gpus()
    assert faults == {2: "GPU is lost"}
    assert {name for name in values if name.startswith("gpu_2")} == set()
    assert values["gpu_3_memory_usage_megabytes"] == 4000 and values["gpu_3_memory_usage_percentage"] == 5
    assert values["gpu_3_power_usage_watts"] == 650 and values["gpu_1_utilization_percentage"] == 97
    assert "gpu_1_power_usage_watts" not in values


@pytest.mark.parametrize("visible", ["1,3", "GPU-b,GPU-d"])
def test_gpus_are_counted_as_this_process_sees_them(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    values, faults = node_metrics.gpus()
    assert values["gpu_0_memory_usage_megabytes"] == 2000 and values["gpu_1_memory_usage_megabytes"] == 4000 and not faults


def test_a_lost_gpu_is_told_of_once_and_samples_go_on():
    posted: list[Event] = []
    monitor: Any = object.__new__(NodeMonitor)
    rounds = iter([False, False, True])
    monitor._ended = SimpleNamespace(wait=lambda seconds: next(rounds))
    monitor._mailbox = SimpleNamespace(post=posted.append)
    monitor._node, monitor._nodes, monitor._unread, monitor.host = "10.0.0.1", 1, set(), dict
    monitor._sample()
    assert [type(event) for event in posted] == [Notice, NodeSample, NodeSample]
    assert isinstance(posted[0], Notice) and posted[0].text == "node 10.0.0.1: can't read GPU 2: GPU is lost"


def test_ray_brings_the_bindings_along():
    """No other installation is needed."""
    names = [name for name in dir(Nvml) if name.startswith(("nvml", "NVML"))]
    assert all(hasattr(bundled, name) for name in [*names, "nvmlInit"])
