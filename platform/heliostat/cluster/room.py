"""How many workers nodes have room for, with the tasks that read the data beside them. Arithmetic alone: the plan asks it of
cluster files, the driver and sweeps of nodes that run.
"""

from __future__ import annotations

from collections.abc import Mapping

from heliostat.spec import Workers

Resources = Mapping[str, float]  # of a node: CPU, GPU
FETCHING = 1.0  # CPUs that a data task needs, on one node


def fits(workers: Workers, node: Resources, taken: float = 0.0) -> int:
    """How many workers a node holds beside `taken` CPUs."""
    count = int((node.get("CPU", 0.0) - taken) / workers.cpus + 1e-6)
    return min(count, int(node.get("GPU", 0.0) / workers.gpus + 1e-6)) if workers.gpus else count


def room(workers: Workers, free: Mapping[str, Resources], held: Mapping[str, int], apart: bool = False) -> int:
    """How many workers fit on the nodes, with a data task on one of them; without one if data is read `apart`, on others. `free`:
    by node; `held`: how many of ours run there already."""
    nodes = [{"CPU": r.get("CPU", 0.0) + held.get(n, 0) * workers.cpus,
              "GPU": r.get("GPU", 0.0) + held.get(n, 0) * workers.gpus} for n, r in free.items()]  # fmt: skip
    most = 1 if workers.placement == "strict_spread" else 1 << 30
    fit = [min(most, fits(workers, node)) for node in nodes]
    if apart:
        return sum(fit)
    lost = [f - min(most, fits(workers, node, FETCHING)) for f, node in zip(fit, nodes, strict=True) if node["CPU"] >= FETCHING]
    return sum(fit) - min(lost) if lost else 0


def starved(workers: Workers, cpus: Mapping[str, float], held: Mapping[str, int]) -> bool:
    """Whether the workers leave none of the nodes that may read data the CPU for it. `cpus`: by node, whoever uses them."""
    return all(total - held.get(n, 0) * workers.cpus < FETCHING - 1e-6 for n, total in cpus.items())
