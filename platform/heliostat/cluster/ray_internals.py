"""Reaches into private parts of Ray 2.60 for other modules: what Ray knows of its nodes and sessions, and has no public name for.

`pyproject.toml` pins Ray for these. How a private Ray starts is in `connect`, which replaces parts of Ray for that time.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch


def free_resources() -> dict[str, dict[str, float]]:
    """Maps the living nodes to the free resources. Ray's public `available_resources` is of the whole cluster."""
    import ray

    resources: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return resources


def draining_nodes() -> set[str]:
    """Returns the ids of the nodes that drain, which `ray.nodes` doesn't tell."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def own_node() -> Any:
    """Returns what this process knows of the Ray that it is connected to: its session, and the processes that it has started."""
    import ray

    return ray._private.worker._global_node


def session_folder() -> Path:
    """Returns the folder of the session of the Ray that this process is connected to."""
    return Path(own_node().get_session_dir_path())


def state_address(address: str) -> str:
    """Finds the address of Ray's state server; `auto` is that of the Ray that runs on this machine."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    return str(canonicalize_bootstrap_address_or_die(address))


def state_client(address: str) -> Any:
    """Makes a client of Ray's state server, which can drain nodes."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=state_address(address))


def jobs_url(address: str) -> str:
    """Finds the address of the Jobs API of a Ray."""
    from ray.dashboard.utils import ray_address_to_api_server_url

    return str(ray_address_to_api_server_url(state_address(address)))


def nvml() -> Any:
    """Returns the bindings of NVML that Ray brings along."""
    return importlib.import_module("ray._private.thirdparty.pynvml")


def actor_lives(actor: Any) -> bool:
    """Tells whether an actor has a process: one that waits for a place after its node was lost has none."""
    import ray

    return ray._private.state.actors(actor._actor_id.hex()).get("State") == "ALIVE"


@contextmanager
def without_notices(actor: str) -> Iterator[None]:
    """Keeps Ray from printing on standard output that an actor died, within the context, in which it is ended on purpose."""
    import ray

    show: Any = ray._private.worker.print_to_stdstream

    def filtered(data: dict[str, Any], ignore_prefix: bool) -> None:
        if lines := [line for line in data["lines"] if actor not in line]:
            show({**data, "lines": lines}, ignore_prefix=ignore_prefix)

    with patch.object(ray._private.worker, "print_to_stdstream", filtered):
        yield
