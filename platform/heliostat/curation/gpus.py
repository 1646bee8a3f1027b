"""Finds the GPUs for tasks that run models, and waits for GPUs that the cluster's autoscaler can add."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from heliostat.cluster import ray_internals
from heliostat.errors import ConfigError, HeliostatError
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.pool import TaskFunction
from heliostat.text import plural

if TYPE_CHECKING:
    from heliostat.curation.streamed import StreamForm

WAIT_S = 600.0  # seconds for an autoscaler to add the first GPU
LOOK_S = 2.0
MOST = 10_000  # actors of a stream, if the autoscaler has no maximum
log = logging.getLogger(__name__)
Taken = TypeVar("Taken")


def awaited(flow: Flow, stages: list[str], wait_s: float = WAIT_S) -> int:
    """Returns the number of GPUs that the pipeline's nodes have, or may have later. Waits up to `wait_s` seconds for the first
    GPU if the cluster's autoscaler can add one. Logs that the `stages` run on CPUs if the cluster has none.
    """
    names, later = ", ".join(stages), _later()
    if later:
        _wait(flow, names, 1.0, wait_s)
    if now := flow.devices():
        return max(now, later)
    labels = f" with the labels {flow.labels}" if flow.labels else ""
    if later:
        log.warning("%s: no node%s with a GPU has joined within %.0f s, so these stages run on CPUs", names, labels, wait_s)
    else:
        log.info("%s: the cluster has no node%s with a GPU, so these stages run on CPUs", names, labels)
    return 0


def require(flow: Flow, key: str, wanted: float) -> None:
    """Raises ConfigError, which begins with the key, if the pipeline's nodes have fewer GPUs than an actor needs, and no
    autoscaler can add them. The actors would wait forever. `wanted`: GPUs per actor, the key's value."""
    if max(count := flow.devices(wanted), _later()) < wanted:
        labels = f" with the labels {flow.labels}" if flow.labels else ""
        have = f"the nodes{labels} have {count}" if wanted <= 1 else f"no node{labels} has more than {count}"
        raise ConfigError(
            f"{key}: an actor needs {plural(wanted, 'GPU')}, but {have}. Set {key} to 0 to compute on CPUs, or use a cluster "
            "with GPUs"
        )


def taken(flow: Flow, plan: StreamForm, key: str, function: TaskFunction, tasks: Iterator[Task],
          take: Callable[[dict[str, Any]], Taken], wait_s: float = WAIT_S) -> list[Taken]:  # fmt: skip
    """Runs tasks in actors that keep a model, and returns what `take` returns for each record, in the tasks' order.

    If actors have GPUs, a stream runs the tasks (`streaming`), after a wait for GPUs that the cluster's autoscaler can add.
    Recorded tasks run what the stream doesn't finish. `key`: of the GPUs per actor, for messages.
    """
    if not plan.gpus_each:
        return flow.taken(plan.kind, function, tasks, take, actors=plan.gpus, gpus=0.0)
    from heliostat.curation import streaming  # takes a second, because it imports Ray Data

    require(flow, key, plan.gpus_each)
    if not _wait(flow, key, plan.gpus_each, wait_s):
        raise HeliostatError(
            f"{key}: no node with {_needed(plan.gpus_each)} has joined within {wait_s:.0f} s. Run the command again, or set "
            f"{key} to 0 to compute on CPUs"
        )
    values, left = dict[int, Taken](), list[tuple[int, Task]]()
    for number, task, record in streaming.run(flow, plan, tasks):
        if record is None:
            left.append((number, task))
        else:
            values[number] = take(record)
    if left:
        more = (task for _, task in left)
        recorded = flow.taken(plan.kind, function, more, take, actors=plan.gpus, gpus=plan.gpus_each)
        values |= {number: value for (number, _), value in zip(left, recorded, strict=True)}
    return [values[number] for number in sorted(values)]


def _needed(each: float) -> str:
    """Returns the GPUs that a node must have for an actor with `each` GPUs, for messages."""
    return plural(each, "GPU") if each > 1 else "a GPU"


def _later() -> int:
    """Returns the number of GPUs that the cluster has after its autoscaler has added all nodes; 0 without an autoscaler."""
    return min(MOST, int(ray_internals.most_resources().get("GPU", 0))) if ray.is_initialized() else 0


def _wait(flow: Flow, names: str, wanted: float, wait_s: float) -> bool:
    """Waits up to `wait_s` seconds until the nodes have `wanted` GPUs. Returns whether they have them.

    Requests a GPU from the autoscaler by a placement group, because `request_resources` would replace the requests of all other
    programs.
    """
    if flow.devices(wanted) >= wanted:
        return True
    why = f"because the cluster's autoscaler can add {_later()}"
    log.info("%s: waiting up to %.0f s for %s, %s", names, wait_s, _needed(wanted), why)
    labels = [dict(flow.labels)] if flow.labels else None
    until, group = time.monotonic() + wait_s, placement_group([{"GPU": wanted}], bundle_label_selector=labels)
    try:
        while flow.devices(wanted) < wanted and time.monotonic() < until:
            time.sleep(LOOK_S)
    finally:
        remove_placement_group(group)
    return flow.devices(wanted) >= wanted
