"""What the cluster's nodes have room for, which of them are about to go, and ending processes on them."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.spec import FETCHING, Workers

log = logging.getLogger(__name__)

ENDING_S = 20.0


def room(workers: Workers, free: Mapping[str, Mapping[str, float]], held: Mapping[str, int]) -> int:
    """How many workers fit on the nodes, with a data task on one. `free`: resources by node; `held`: how many of ours run there
    already."""
    nodes = [{**r, "CPU": r.get("CPU", 0.0) + held.get(n, 0) * workers.cpus,
              "GPU": r.get("GPU", 0.0) + held.get(n, 0) * workers.gpus} for n, r in free.items()]  # fmt: skip
    most = 1 if workers.placement == "strict_spread" else 1 << 30
    fit = [min(most, fits(workers, node)) for node in nodes]
    beside = [f - min(most, fits(workers, node, FETCHING)) for f, node in zip(fit, nodes, strict=True) if node["CPU"] >= FETCHING]
    return sum(fit) - min(beside) if beside else 0


def fits(workers: Workers, node: Mapping[str, float], taken: float = 0.0) -> int:
    """How many workers a node with these resources holds beside `taken` CPUs."""
    count = int((node["CPU"] - taken) / workers.cpus + 1e-6)
    return min(count, int(node["GPU"] / workers.gpus + 1e-6)) if workers.gpus else count


def starved(workers: Workers, held: Mapping[str, int], labels: Mapping[str, str]) -> bool:
    """Whether the workers leave no node with these labels the CPU that a data task needs."""
    fit = [n for n in ray.nodes() if n["Alive"] and labels.items() <= n.get("Labels", {}).items()]
    return all(n["Resources"].get("CPU", 0.0) - held.get(n["NodeID"], 0) * workers.cpus < FETCHING - 1e-6 for n in fit)


def room_now(workers: Workers, held: Mapping[str, int]) -> int:
    """The same of the cluster as it is; nodes that are about to go, or lack the workers' labels, have no room."""
    free, leaving = ray._private.state.available_resources_per_node(), draining()
    fit = {n["NodeID"] for n in ray.nodes() if n["Alive"] and workers.labels.items() <= n.get("Labels", {}).items()} - leaving
    return room(workers, {n: r for n, r in free.items() if n in fit}, held)


def census() -> list[dict[str, Any]]:
    """The cluster's living nodes, as plain data."""
    return [
        {
            "host": node["NodeManagerHostname"],
            "address": node["NodeManagerAddress"],
            "cpus": node["Resources"].get("CPU", 0.0),
            "gpus": node["Resources"].get("GPU", 0.0),
            "accelerators": [k.split(":", 1)[1] for k in node["Resources"] if k.startswith("accelerator_type:")],
            "memory_gib": round(node["Resources"].get("memory", 0.0) / 2**30, 1),
            "labels": {k: v for k, v in node.get("Labels", {}).items() if not k.startswith("ray.io/")},
        }
        for node in sorted(ray.nodes(), key=lambda n: n["NodeManagerAddress"])
        if node["Alive"]
    ]


def draining() -> set[str]:
    """Nodes that have been told to go: preempted by their provider, or drained by a person."""
    return set(ray._private.state.state.get_draining_nodes())


def ask_for(workers: Workers, count: int) -> None:
    """Tells the autoscaler, where there is one, that so many workers are wanted."""
    from ray.autoscaler.sdk import request_resources

    need = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    request_resources(bundles=[need] * count)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill(processes: list[dict[str, Any]]) -> None:
    """Ends processes, given as {node, pid}, frozen ones too; returns when that is done, or could not be within 20 s."""
    waiting = []
    for node in Counter(p["node"] for p in processes):
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        waiting.append(_kill.options(scheduling_strategy=there).remote([p["pid"] for p in processes if p["node"] == node]))
    _, late = ray.wait(waiting, num_returns=len(waiting), timeout=ENDING_S)
    if late:
        log.warning("%d nodes did not end their workers within %.0f s", len(late), ENDING_S)
