"""Finds the GPUs for the stages that run models, and waits for GPUs that the cluster's autoscaler can add."""

from __future__ import annotations

import logging
import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from heliostat.cluster import ray_internals
from heliostat.errors import ConfigError
from heliostat.tasks.flow import Flow
from heliostat.text import plural

WAIT_S = 600.0  # seconds for an autoscaler to add the first GPU
LOOK_S = 2.0
MOST = 10_000  # actors of a stream, if the autoscaler has no maximum
log = logging.getLogger(__name__)


def awaited(flow: Flow, stages: list[str], wait_s: float = WAIT_S) -> int:
    """Returns the number of GPUs that the pipeline's nodes have, or may have later. Waits up to `wait_s` seconds for the first
    GPU if the cluster's autoscaler can add one. Logs that the `stages` run on CPUs if the cluster has none.
    """
    names, later = ", ".join(stages), _later()
    if not flow.devices() and later:
        log.info("%s: waiting up to %.0f s for a GPU, because the cluster's autoscaler can add %d", names, wait_s, later)
        _wait(flow, wait_s)
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
    if (count := max(flow.devices(), _later())) < wanted:
        labels = f" with the labels {flow.labels}" if flow.labels else ""
        raise ConfigError(
            f"{key}: an actor needs {plural(wanted, 'GPU')}, but the nodes{labels} have {count}. Set {key} to 0 to "
            "compute on CPUs, or use a cluster with GPUs"
        )


def _later() -> int:
    """Returns the number of GPUs that the cluster has after its autoscaler has added all nodes; 0 without an autoscaler."""
    return min(MOST, int(ray_internals.most_resources().get("GPU", 0))) if ray.is_initialized() else 0


def _wait(flow: Flow, wait_s: float) -> None:
    """Requests a GPU from the autoscaler, and waits for the GPU.

    The request is a placement group, because `request_resources` would replace the requests of all other programs.
    """
    labels = [dict(flow.labels)] if flow.labels else None
    until, group = time.monotonic() + wait_s, placement_group([{"GPU": 1}], bundle_label_selector=labels)
    try:
        while not flow.devices() and time.monotonic() < until:
            time.sleep(LOOK_S)
    finally:
        remove_placement_group(group)
