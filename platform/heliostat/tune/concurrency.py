"""Counts how many trials run side by side: as many as can place all their workers at once, since half-placed trials would wait
for each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from heliostat.cluster.capacity import FETCHING, fits
from heliostat.config.spec import Workers

TRIAL_CPUS = 0.1  # of Tune's actor for a trial


def gangs(workers: Workers, free: Mapping[str, Mapping[str, float]]) -> int:
    """Counts the trials of `workers` that fit on the nodes together, each with a data task on some node. `free`: resources by
    node."""
    nodes = [{"CPU": r.get("CPU", 0.0), "GPU": r.get("GPU", 0.0)} for r in free.values()]
    aside, count = FETCHING + TRIAL_CPUS, 0
    while beside := [n for n in nodes if n["CPU"] >= aside]:
        node = min(beside, key=lambda n: fits(workers, n) - fits(workers, n, aside))
        node["CPU"] -= aside
        most = count + 1 if workers.placement == "strict_spread" else 1 << 30
        if sum(min(most, fits(workers, n)) for n in nodes) < (count + 1) * workers.most:
            break
        count += 1
    return count


def here(workers: Workers, cores: int) -> int:
    """Counts the trials that fit on this machine's cores, at least 1, where Ray is started for the sweep alone and data tasks
    mostly wait."""
    return 1 if workers.gpus else max(1, int(cores / (workers.most * workers.cpus) + 1e-6))
