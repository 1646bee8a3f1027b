"""Finds the free resources and the draining nodes of a running cluster, and kills processes on its nodes."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.cluster import ray_internals
from heliostat.cluster.capacity import FETCHING, LivingNode, missing, room, selects, starved
from heliostat.config.spec import Job, Workers

log = logging.getLogger(__name__)

ENDING_S = 20.0
SAY_S, AGAIN_S = 4.0, 60.0
NODE_ID = "ray.io/node-id"  # the label that Ray gives every node


def room_now(job: Job, in_use: Mapping[str, int], avoided: Collection[str] = ()) -> int:
    """Computes how many workers fit on the running cluster.

    `in_use`: number of this run's workers on each node. Skips nodes that are draining, nodes without the workers' labels, and
    nodes in `avoided`.
    """
    free, leaving = ray_internals.free_resources(), draining().union(avoided)
    train, data = carrying(job.workers.labels), carrying(job.data.labels)
    apart = any(cpus >= FETCHING for n, cpus in data.items() if n not in train and n not in leaving)
    return room(job.workers, {n: r for n, r in free.items() if n in train and n not in leaving}, in_use, apart)


def starved_now(job: Job, in_use: Mapping[str, int]) -> bool:
    """Checks whether the run's workers use so many CPUs that no node has enough CPUs left for reading the data."""
    return starved(job.workers, carrying(job.data.labels), in_use)


def crowded_now(job: Job) -> str | None:
    """Explains with numbers that no node has a free CPU to read the run's data. Returns None if a node has a free CPU."""
    labeled, free = carrying(job.data.labels), ray_internals.free_resources()
    left = {n: free.get(n, {}).get("CPU", 0.0) for n in labeled}
    if any(cpus >= FETCHING - 1e-6 for cpus in left.values()):
        return None
    total = sum(labeled.values())
    return (
        f"no node has the {FETCHING:g} free CPU that reading the data needs: {len(labeled)} nodes have {total:g} "
        f"CPUs, and {total - sum(left.values()):g} of them are in use by this run's workers, by this run's data "
        "tasks, and by other "
        "jobs"
    )


class Shortage:
    """Reports missing resources while workers wait for resources: 4 s after the start of the wait, then every minute."""

    def __init__(self, job: Job) -> None:
        self.job, self._due = job, time.monotonic() + SAY_S

    def told(self) -> str | None:
        """Returns a report of the missing resources; None if it isn't time for a report, or if nothing is missing."""
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + AGAIN_S
        return missing_now(self.job)


def missing_now(job: Job) -> str | None:
    """Explains, in numbers, which resources are missing for the job's workers; None if all workers fit."""
    if room_now(job, {}) >= job.workers.most:
        return None
    free, leaving = ray_internals.free_resources(), draining()
    train, data = carrying(job.workers.labels), carrying(job.data.labels)
    all_ = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["NodeID"] in train and n["NodeID"] not in leaving}
    apart = any(cpus >= FETCHING for n, cpus in data.items() if n not in train and n not in leaving)
    return missing(job.workers, job.workers.most, all_, {n: free.get(n, {}) for n in all_}, apart)


def carrying(labels: Mapping[str, str]) -> dict[str, float]:
    """Maps each living node that matches a label selector to its total CPUs, free or in use."""
    return {n["NodeID"]: n["Resources"].get("CPU", 0.0) for n in ray.nodes()
            if n["Alive"] and selects(labels, n.get("Labels") or {})}  # fmt: skip


def except_on(lost: Collection[str], labels: Mapping[str, str]) -> dict[str, str]:
    """Extends a label selector so that it excludes the lost nodes, if another matching node can read data.

    Until a lost node has missed some health checks, Ray counts it as alive. Tasks that Ray gives to this node never start.
    """
    labeled = carrying(labels)
    others = any(cpus >= FETCHING for node, cpus in labeled.items() if node not in lost)
    here = sorted(labeled.keys() & set(lost)) if others else []
    return {**labels, **({NODE_ID: f"!in({','.join(here)})"} if here else {})}


def free(labels: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Maps the living nodes with these labels to their free resources."""
    available, labeled = ray_internals.free_resources(), carrying(labels)
    return {node: resources for node, resources in available.items() if node in labeled}


def inventory() -> list[LivingNode]:
    """Lists the cluster's living nodes."""
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
    """Returns the ids of the draining nodes: nodes that their provider preempts, and nodes that a person drains."""
    return ray_internals.draining_nodes()


def ask_for(workers: Workers, count: int) -> None:
    """Requests resources for `count` workers from the autoscaler, if the cluster has an autoscaler."""
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


def kill(processes: Collection[Mapping[str, Any]]) -> None:
    """Kills processes, each written as {node, pid}, with SIGKILL. This signal ends frozen processes too.

    Waits at most 20 s until each node has sent the signals. Logs a warning about nodes that haven't sent the signals.
    """
    waiting = []
    for node in Counter(p["node"] for p in processes):
        affinity = NodeAffinitySchedulingStrategy(node, soft=False)
        waiting.append(_kill.options(scheduling_strategy=affinity).remote([p["pid"] for p in processes if p["node"] == node]))
    _, late = ray.wait(waiting, num_returns=len(waiting), timeout=ENDING_S)
    if late:
        log.warning("%d nodes didn't end their workers within %.0f s, so these workers may still run", len(late), ENDING_S)
