"""Checks whether a cluster file's pools fit a job's workers, and the tasks that read its data beside them."""

from __future__ import annotations

from heliostat.cluster.capacity import FETCHING, room
from heliostat.cluster.cluster_file import ClusterFile, NodePool
from heliostat.cluster.labels import selects
from heliostat.config.spec import Job
from heliostat.errors import ConfigError


def check(job: Job, cluster: ClusterFile) -> None:
    """Raises ConfigError if the cluster, at its largest, cannot hold all workers, or cannot read data beside them."""
    need = job.workers
    train, data = _pools(cluster, "workers.labels", need.labels), _pools(cluster, "data.labels", job.data.labels)
    if not train or any(p.cpus is None for p in [*train, *data]):
        return  # Ray finds out
    nodes = {f"{p.name}/{i}": {"CPU": p.cpus or 0.0, "GPU": p.gpus} for p in train for i in range(p.most)}
    if (fits := room(need, nodes, {}, apart=True)) < need.least:
        raise ConfigError(
            f"workers.count: {need.least} workers of {need.cpus:g} CPUs and {need.gpus:g} GPUs do not fit on {cluster.path}, "
            f"which has room for {fits} at its largest; lower it, or raise the pool's maximum"
        )
    if any(p not in train and p.most and (p.cpus or 0.0) >= FETCHING for p in data):
        return
    if not any(p in train for p in data) or room(need, nodes, {}) < need.least:
        raise ConfigError(
            f"workers.cpus: {need.least} workers of {need.cpus:g} CPUs leave no node of {cluster.path} the {FETCHING:g} CPU that "
            "reading the data needs; lower workers.cpus or workers.count, or add a node"
        )


def _pools(cluster: ClusterFile, field: str, labels: dict[str, str]) -> list[NodePool]:
    """Selects the pools whose nodes the labels select; ConfigError if pools have labels, but none has these."""
    found = [p for p in cluster.pools if selects(labels, p.labels)]
    if labels and not found and any(p.labels for p in cluster.pools):
        have = sorted({f"{k}={v}" for p in cluster.pools for k, v in p.labels.items()})
        raise ConfigError(f"{field}: no pool of {cluster.path} carries {dict(labels)}; there are {', '.join(have)}")
    return found
