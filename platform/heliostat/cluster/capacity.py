"""Computes how many workers fit on a cluster's nodes, in addition to the tasks that read the data.

The functions are pure. The plan calls them with the nodes of cluster files. The driver and sweeps call them with running nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from heliostat.cluster.cluster_file import ClusterFile, NodePool
from heliostat.config.spec import Job, Workers
from heliostat.errors import ConfigError

Resources = Mapping[str, float]  # a node's amounts of CPU and GPU
FETCHING = 1.0  # CPUs that a data task needs, all on one node


class LivingNode(TypedDict):
    """Describes a living node of the cluster."""

    host: str
    address: str
    cpus: float
    gpus: float
    accelerators: list[str]
    memory_gib: float
    labels: dict[str, str]


def fits(workers: Workers, node: Resources, taken: float = 0.0) -> int:
    """Computes how many workers fit on a node after `taken` of its CPUs are reserved."""
    count = int((node.get("CPU", 0.0) - taken) / workers.cpus + 1e-6)
    return min(count, int(node.get("GPU", 0.0) / workers.gpus + 1e-6)) if workers.gpus else count


def room(workers: Workers, free: Mapping[str, Resources], in_use: Mapping[str, int], apart: bool = False) -> int:
    """Computes how many workers fit on the nodes if one of the nodes also runs a data task; 0 if no node can run the data task.

    `free`: free resources by node. `in_use`: number of this run's workers on each node; the resources of these workers count as
    free. `apart`: whether other nodes read the data. If so, no data task is counted.
    """
    nodes = [{"CPU": r.get("CPU", 0.0) + in_use.get(n, 0) * workers.cpus,
              "GPU": r.get("GPU", 0.0) + in_use.get(n, 0) * workers.gpus} for n, r in free.items()]  # fmt: skip
    most = 1 if workers.placement == "strict_spread" else 1 << 30
    fit = [min(most, fits(workers, node)) for node in nodes]
    if apart:
        return sum(fit)
    lost = [f - min(most, fits(workers, node, FETCHING)) for f, node in zip(fit, nodes, strict=True) if node["CPU"] >= FETCHING]
    return sum(fit) - min(lost) if lost else 0


def spots(workers: Workers, free: Mapping[str, Resources], in_use: Mapping[str, int], count: int) -> list[str] | None:
    """Chooses a node for each of `count` workers by `workers.placement`. Returns None if not all of the workers fit.

    `free`: free resources by node. `in_use`: number of this run's workers on each node.
    """
    most = 1 if workers.placement == "strict_spread" else 1 << 30
    left = {n: min(most - in_use.get(n, 0), fits(workers, node)) for n, node in free.items()}
    placed, chosen = {n: in_use.get(n, 0) for n in free}, list[str]()
    for _ in range(count):
        fewest = -1 if workers.placement == "pack" else 1
        # first criterion: most of the run's workers (pack) or fewest (spread); then the most room
        best = min((n for n in left if left[n] > 0), key=lambda n: (fewest * placed[n], -left[n], n), default=None)
        if best is None:
            return None
        placed[best], left[best] = placed[best] + 1, left[best] - 1
        chosen.append(best)
    return chosen


def starved(workers: Workers, cpus: Mapping[str, float], in_use: Mapping[str, int]) -> bool:
    """Checks whether the workers use so many CPUs that no node has enough CPUs left for a data task.

    `cpus`: total CPUs of each node that may read data. `in_use`: number of the workers on each node.
    """
    return all(total - in_use.get(n, 0) * workers.cpus < FETCHING - 1e-6 for n, total in cpus.items())


def require_gpus(wanted: float) -> int:
    """Returns the number of this machine's GPUs; raises ConfigError if the workers together need more GPUs."""
    import torch

    if (count := torch.cuda.device_count()) >= wanted:
        return count
    have = f"{count} usable GPUs" if count else "no usable GPU"
    raise ConfigError(
        f"workers.gpus: the workers need {wanted:g} GPUs, but this machine has {have}, and no cluster is named. "
        "Use `heliostat submit`, name the cluster's file with `heliostat check --cluster`, or lower workers.gpus "
        "or workers.count"
    )


def missing(
    workers: Workers, count: int, all_: Mapping[str, Resources], free: Mapping[str, Resources], apart: bool = False
) -> str:
    """Explains, in numbers, why `count` workers wait for resources.

    `all_`: total resources of the nodes that the workers may use, by node. `free`: free resources of the same nodes, by node.
    `apart`: whether other nodes read the data.
    """
    need = f"{count} workers of {_amount(workers.cpus, workers.gpus)}"
    need += "" if apart else f", and {FETCHING:g} CPU for reading the data"
    if not all_:
        labels = ", ".join(f"{k}={v}" for k, v in workers.labels.items())
        return f"no living node{f' with the labels {labels}' if labels else ''} can hold {need}; waiting for such a node"
    have = [sum(node.get(kind, 0.0) for node in all_.values()) for kind in ("CPU", "GPU")]
    left = [sum(free.get(name, {}).get(kind, 0.0) for name in all_) for kind in ("CPU", "GPU")]
    used = _amount(have[0] - left[0], have[1] - left[1] if workers.gpus else 0)
    now, empty = room(workers, free, {}, apart), room(workers, all_, {}, apart)
    text = (
        f"no room for {need}: the {len(all_)} nodes that can hold such workers have "
        f"{_amount(have[0], have[1] if workers.gpus else 0)}, of which other jobs use {used}. There is room for {now} workers "
        f"now, and for {empty} workers when the other jobs have ended"
    )
    return (
        f"{text}; "
        f"{'waiting' if empty >= count else 'waiting for more nodes. To start earlier, lower workers.count or workers.cpus'}"
    )


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs{f' and {gpus:g} GPUs' if gpus else ''}"


# pools of cluster files, and labels -----------------------------------------------------------------------------------


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Checks whether a node's labels meet every condition of a label selector.

    A condition is VALUE, !VALUE, in(VALUE, ...), or !in(VALUE, ...).
    """
    return all(_meets(condition, labels.get(name)) for name, condition in selector.items())


def _meets(condition: str, value: str | None) -> bool:
    wanted = condition.removeprefix("!")
    listed = wanted.startswith("in(") and wanted.endswith(")")
    values = [one.strip() for one in wanted[3:-1].split(",")] if listed else [wanted]
    return (value in values) is not condition.startswith("!")


def check_pools(job: Job, cluster: ClusterFile) -> None:
    """Raises ConfigError if the job's minimum of workers, or a data task, doesn't fit on the cluster at its maximum size."""
    need = job.workers
    train, data = _pools(cluster, "workers.labels", need.labels), _pools(cluster, "data.labels", job.data.labels)
    if not train or any(p.cpus is None for p in [*train, *data]):
        return  # the file doesn't show the nodes' CPUs; only a running Ray shows them
    nodes = {f"{p.name}/{i}": {"CPU": p.cpus or 0.0, "GPU": p.gpus} for p in train for i in range(p.most)}
    if (fits := room(need, nodes, {}, apart=True)) < need.least:
        raise ConfigError(
            f"workers.count: {need.least} workers of {need.cpus:g} CPUs and {need.gpus:g} GPUs don't fit on "
            f"{cluster.path}, which has room for {fits} workers at its maximum. Lower workers.count, or raise the pool's maximum"
        )
    if any(p not in train and p.most and (p.cpus or 0.0) >= FETCHING for p in data):
        return
    if not any(p in train for p in data) or room(need, nodes, {}) < need.least:
        raise ConfigError(
            f"workers.cpus: {need.least} workers of {need.cpus:g} CPUs fill the nodes of {cluster.path}: no node has the "
            f"{FETCHING:g} CPU left that reading the data needs. Lower workers.cpus or workers.count, or add a node"
        )


def _pools(cluster: ClusterFile, field: str, labels: dict[str, str]) -> list[NodePool]:
    """Returns the pools that match the labels; raises ConfigError if some pools have labels, but no pool has these labels."""
    pools = [p for p in cluster.pools if selects(labels, p.labels)]
    if labels and not pools and any(p.labels for p in cluster.pools):
        have = sorted({f"{k}={v}" for p in cluster.pools for k, v in p.labels.items()})
        raise ConfigError(f"{field}: no pool of {cluster.path} has the labels {dict(labels)}. Labels: {', '.join(have)}")
    return pools
