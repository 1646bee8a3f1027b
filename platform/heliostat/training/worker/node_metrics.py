"""Measures how busy a node is while workers train on it: processors, memory, disk, network, GPUs.

The first worker of each node takes samples in a thread, and posts them to the driver's mailbox. The names are MLflow's names of
system metrics, prefixed with the node's address. Samples are at least EVERY_S seconds apart; with many nodes, the interval grows
so that all nodes together give MLflow at most POINTS_PER_S. MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets a fixed interval in
seconds instead.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from contextlib import suppress
from types import ModuleType

import psutil
import torch

from heliostat.cluster import ray_internals
from heliostat.data import device_threads
from heliostat.runs.events import NodeSample, Notice
from heliostat.training.mailbox import AttemptMailbox

MB = 1e6
INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
EVERY_S = 10.0
POINTS_PER_S = 10.0  # 0.9 million per day: for example, two 8-GPU nodes every 10 s, or 64 nodes every 4 min


def interval(nodes: int, points: int) -> float:
    """Computes the seconds between two samples of a node that reports `points` metrics each time."""
    return max(EVERY_S, nodes * points / POINTS_PER_S)


class NodeMonitor:
    """Measures a node's system metrics in a thread until `end` is called."""

    def __init__(self, mailbox: AttemptMailbox, node: str, nodes: int) -> None:
        """Starts sampling. `nodes`: the number of nodes of the run."""
        self._mailbox, self._node, self._nodes = mailbox, node, nodes
        self._network = psutil.net_io_counters()
        self._unread: set[int] = set()  # GPUs that were reported as unreadable
        self._ended = threading.Event()
        psutil.cpu_percent()  # the first call only starts the measurement
        device_threads.thread(self._sample, "system")

    def end(self) -> None:
        self._ended.set()

    def _sample(self) -> None:
        fixed = os.environ.get(INTERVAL)
        every = float(fixed) if fixed else EVERY_S
        while not self._ended.wait(every):
            measured, faults = gpus()
            for gpu in faults.keys() - self._unread:
                self._mailbox.post(Notice(text=f"node {self._node}: can't read GPU {gpu}: {faults[gpu]}"))
            self._unread |= faults.keys()
            values = self.host() | measured
            self._mailbox.post(NodeSample(node=self._node, values=values))
            if not fixed:
                every = interval(self._nodes, len(values))

    def host(self) -> dict[str, float]:
        memory, disk, before = psutil.virtual_memory(), psutil.disk_usage("/"), self._network
        self._network = psutil.net_io_counters()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "network_receive_megabytes": (self._network.bytes_recv - before.bytes_recv) / MB,
            "network_transmit_megabytes": (self._network.bytes_sent - before.bytes_sent) / MB,
        }


def gpus() -> tuple[dict[str, float], dict[int, str]]:
    """Measures every GPU that this process sees.

    Returns the values. For each GPU that couldn't be read, also returns the reason, by the GPU's number.

    NVML reads a GPU without CUDA. `torch.cuda.mem_get_info` would create a CUDA context of about 500 MB on each GPU.
    """
    values: dict[str, float] = {}
    faults: dict[int, str] = {}
    if not torch.cuda.is_available():
        return values, faults
    if (nvml := _nvml()) is None:
        return _own()
    for i, name in enumerate(_visible(nvml)):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as e:
            faults[i] = str(e)
            continue
        values[f"gpu_{i}_memory_usage_megabytes"] = memory.used / MB
        values[f"gpu_{i}_memory_usage_percentage"] = 100 * memory.used / memory.total
        with suppress(nvml.NVMLError):  # not every GPU measures these values
            values[f"gpu_{i}_utilization_percentage"] = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            values[f"gpu_{i}_power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return values, faults


def _own() -> tuple[dict[str, float], dict[int, str]]:
    """Measures only the memory of this process's own GPU. Used without NVML, for example for AMD's GPUs."""
    gpu = torch.cuda.current_device()
    try:
        free, total = torch.cuda.mem_get_info(gpu)
    except RuntimeError as e:
        return {}, {gpu: str(e)}
    used = total - free
    return {f"gpu_{gpu}_memory_usage_megabytes": used / MB, f"gpu_{gpu}_memory_usage_percentage": 100 * used / total}, {}


def _visible(nvml: ModuleType) -> list[str]:
    """Lists the GPUs that this process sees, as NVML's numbers or UUIDs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(nvml.nvmlDeviceGetCount())]


@functools.cache
def _nvml() -> ModuleType | None:
    """Returns the NVML bindings: those of `nvidia-ml-py`, or else Ray's copy. Returns None without NVIDIA's driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        nvml = ray_internals.nvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
