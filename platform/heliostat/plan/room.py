"""Whether a cluster file's pools have room for a job's workers, and for the tasks that read its data beside them."""

from __future__ import annotations

import math

from heliostat.cluster.files import ClusterFile, Pool
from heliostat.errors import ConfigError
from heliostat.spec import FETCHING, Job


def check(job: Job, cluster: ClusterFile) -> None:
    """ConfigError if the cluster, at its largest, has no place for all workers."""
    need = job.workers
    pools = [p for p in cluster.pools if all(p.labels.get(k) == v for k, v in need.labels.items())]
    if need.labels and not pools and any(p.labels for p in cluster.pools):
        have = sorted({f"{k}={v}" for p in cluster.pools for k, v in p.labels.items()})
        raise ConfigError(f"workers.labels: no pool of {cluster.path} carries {dict(need.labels)}; there are {', '.join(have)}")
    known = [p for p in pools if p.cpus is not None]
    fits = sum(p.most * _fit(p.cpus or 0, p.gpus, need.cpus, need.gpus) for p in known)
    if not known or len(known) < len(pools):
        return
    if fits < need.least:
        raise ConfigError(
            f"workers.count: {need.least} workers of {need.cpus:g} CPUs and {need.gpus:g} GPUs do not fit on {cluster.path}, "
            f"which has room for {fits} at its largest; lower it, or raise the pool's maximum"
        )
    _check_fetching(job, cluster, known, fits)


def _check_fetching(job: Job, cluster: ClusterFile, train: list[Pool], fits: int) -> None:
    """ConfigError if the workers leave no node the CPU that a data task needs."""
    need = job.workers
    data = [p for p in cluster.pools if all(p.labels.get(k) == v for k, v in job.data.labels.items())]
    if any(p.cpus is None or (p not in train and p.most and p.cpus >= FETCHING) for p in data):
        return
    shared = [(p, p.cpus) for p in data if p in train and p.cpus and p.cpus >= FETCHING]
    lost = min((_fit(c, p.gpus, need.cpus, need.gpus) - _fit(c - FETCHING, p.gpus, need.cpus, need.gpus)
                for p, c in shared), default=fits)  # fmt: skip
    if fits - lost < need.least:
        raise ConfigError(
            f"workers.cpus: {need.least} workers of {need.cpus:g} CPUs leave no node of {cluster.path} the {FETCHING:g} CPU that "
            "reading the data needs; lower workers.cpus or workers.count, or add a node"
        )


def _fit(cpus: float, gpus: float, need_cpus: float, need_gpus: float) -> int:
    return int(min(cpus // need_cpus, gpus // need_gpus if need_gpus else math.inf))
