"""Measures how busy a node is while workers train on it: processors, memory, disk, network, GPUs.

The first worker of each node samples, in a thread, and posts to the driver's mailbox. The names are MLflow's own for system
metrics, below the node's address. Samples are 10 seconds apart, and the more nodes there are, the further: all of them together
give MLflow no more than POINTS_PER_S. MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets the seconds whatever their number.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import psutil
import torch

from heliostat import device_threads
from heliostat.events import NodeSample

MB = 1e6
INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
EVERY_S = 10.0
POINTS_PER_S = 10.0  # 0.9 million a day: two 8-GPU nodes at every 10 s, 64 at every 4 min


def interval(nodes: int, points: int) -> float:
    """Computes the seconds between two samples of a node that gives `points` metrics each time."""
    return max(EVERY_S, nodes * points / POINTS_PER_S)


class NodeMonitor:
    """Measures a node's system metrics in a thread until `end`."""

    def __init__(self, mailbox: Any, node: str, nodes: int) -> None:
        """Starts sampling; `nodes`: how many nodes there are in all."""
        self._mailbox, self._node, self._nodes = mailbox, node, nodes
        self._network = psutil.net_io_counters()
        self._ended = threading.Event()
        psutil.cpu_percent()  # the first call only sets a mark
        device_threads.thread(self._sample, "system")

    def end(self) -> None:
        self._ended.set()

    def _sample(self) -> None:
        fixed = os.environ.get(INTERVAL)
        every = float(fixed) if fixed else EVERY_S
        while not self._ended.wait(every):
            values = self.host() | gpus()
            self._mailbox.post.remote(NodeSample(node=self._node, values=values))
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


def gpus() -> dict[str, float]:
    """Measures every GPU that this process sees, by NVIDIA's `nvidia-ml-py`. Without that package, measures its own GPU's memory.

    CUDA's own question for a GPU's memory makes a context on it, so this asks for no other GPU's.
    """
    if not torch.cuda.is_available():
        return {}
    out: dict[str, float] = {}
    for i in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(i).total_memory
        try:
            out |= _memory(i, torch.cuda.device_memory_used(i), total)
            out[f"gpu_{i}_utilization_percentage"] = float(torch.cuda.utilization(i))
            out[f"gpu_{i}_power_usage_watts"] = torch.cuda.power_draw(i) / 1000
        except (ModuleNotFoundError, RuntimeError):
            if i == torch.cuda.current_device():
                out |= _memory(i, total - torch.cuda.mem_get_info(i)[0], total)
    return out


def _memory(gpu: int, used: int, total: int) -> dict[str, float]:
    return {f"gpu_{gpu}_memory_usage_megabytes": used / MB, f"gpu_{gpu}_memory_usage_percentage": 100 * used / total}
