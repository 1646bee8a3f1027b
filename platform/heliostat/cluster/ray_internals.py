"""Wraps private parts of Ray 2.60 for other modules: facts about nodes and sessions that Ray's public API doesn't have.

Because of these private parts, `pyproject.toml` pins the version of Ray. This module doesn't wrap all private parts that
heliostat uses: while a private Ray starts, the module `connect` replaces other private parts.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch


def free_resources() -> dict[str, dict[str, float]]:
    """Maps the living nodes to their free resources. Ray's public `available_resources` has only the sum over all nodes."""
    import ray

    resources: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return resources


def most_resources() -> dict[str, int]:
    """Returns the resources of the cluster after its autoscaler has added all nodes. Returns an empty dictionary if the cluster
    has no autoscaler."""
    import ray

    return ray._private.state.state.get_max_resources_from_cluster_config() or {}


def draining_nodes() -> set[str]:
    """Returns the ids of the draining nodes. `ray.nodes` doesn't show which nodes are draining."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def own_node() -> Any:
    """Returns Ray's record of this process's connection: the session, and the Ray processes that this process has started."""
    import ray

    return ray._private.worker._global_node


def session_folder() -> Path:
    """Returns the session folder of the Ray that this process is connected to."""
    return Path(own_node().get_session_dir_path())


def state_address(address: str) -> str:
    """Returns the address of Ray's state server (GCS). `auto` means the Ray that runs on this machine."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    return str(canonicalize_bootstrap_address_or_die(address))


def state_client(address: str) -> Any:
    """Makes a client of Ray's state server (GCS), which can drain nodes."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=state_address(address))


def jobs_url(address: str) -> str:
    """Returns the URL of the Jobs API of the Ray whose state server is at `address`."""
    from ray.dashboard.utils import ray_address_to_api_server_url

    return str(ray_address_to_api_server_url(state_address(address)))


def nvml() -> Any:
    """Returns the Python bindings of NVML that Ray contains."""
    return importlib.import_module("ray._private.thirdparty.pynvml")


def actor_lives(actor: Any) -> bool:
    """Checks whether an actor has a process. After the loss of its node, an actor has no process until Ray places it on another
    node."""
    import ray

    return ray._private.state.actors(actor._actor_id.hex()).get("State") == "ALIVE"


@contextmanager
def without_notices(actor: str) -> Iterator[None]:
    """Hides Ray's lines about an actor on standard output within the context. Use the context for code that ends the actor on
    purpose."""
    import ray

    show: Any = ray._private.worker.print_to_stdstream

    def filtered(data: dict[str, Any], ignore_prefix: bool) -> None:
        if lines := [line for line in data["lines"] if actor not in line]:
            show({**data, "lines": lines}, ignore_prefix=ignore_prefix)

    with patch.object(ray._private.worker, "print_to_stdstream", filtered):
        yield
