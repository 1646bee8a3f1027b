"""How many trials run side by side: as many as all workers of each find a place at once, or half-placed trials would wait for
each other."""

from __future__ import annotations

from collections.abc import Mapping

from heliostat.cluster.nodes import FETCHING
from heliostat.spec import Workers

TRIAL_CPUS = 0.1  # of Tune's actor for a trial


def gangs(workers: Workers, free: Mapping[str, Mapping[str, float]]) -> int:
    """Trials of `workers` that fit on the nodes together. `free`: resources by node."""
    need = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    slots = [min(int(r.get(key, 0.0) / amount + 1e-6) for key, amount in need.items()) for r in free.values()]
    cpus = sum(r.get("CPU", 0.0) for r in free.values())
    count = min(sum(slots) // workers.most, int(cpus / (workers.most * workers.cpus + FETCHING + TRIAL_CPUS) + 1e-6))
    if workers.placement == "strict_spread":
        while count and sum(min(s, count) for s in slots) < count * workers.most:
            count -= 1
    return count


def here(workers: Workers, cores: int) -> int:
    """The same for this machine's cores, where Ray is started for the sweep alone and the data tasks mostly wait; 1 or more."""
    return 1 if workers.gpus else max(1, int(cores / (workers.most * workers.cpus) + 1e-6))
