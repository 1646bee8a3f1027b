"""Makes this process a driver of a local cluster: `--cluster` of commands that connect to Ray themselves, as `serve` and `infer`.

A driver of Ray must be on a node of its cluster. A cluster of this machine's is joined from here; one that is elsewhere is joined
by the same command on its head node, where `RAY_ADDRESS` (or `auto`) names it.
"""

from __future__ import annotations

import os
import re

from heliostat.cluster import local
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.cluster.endpoint import endpoint
from heliostat.errors import ConfigError

PORT = 6379  # Ray's own


def join(target: str | None) -> None:
    """Sets this process's environment so that Ray, which is not imported yet, connects to the cluster; None: leaves it as it is.

    ConfigError if `target` names no cluster of this machine, or RAY_ADDRESS another one; ClusterError if it does not answer.
    """
    if target is None:
        return
    if named := os.environ.get("RAY_ADDRESS"):
        raise ConfigError(f"--cluster: RAY_ADDRESS names a cluster, too ({named}); unset it, or leave --cluster out")
    with endpoint(target) as there:
        file = there.file
        state = local.read(file.name) if file and file.local else None
        if file is None or state is None:
            raise ConfigError(
                f"--cluster: {target!r} is no cluster that `heliostat cluster up` has started on this machine; give the command "
                "on the head node of one that is elsewhere, with RAY_ADDRESS=auto"
            )
        os.environ |= {"RAY_ADDRESS": address(file), "RAY_AUTH_MODE": "token"}
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(state.token_file.resolve())


def address(cluster: ClusterFile) -> str:
    """Returns the address of Ray's state server, as the head's start command sets it."""
    port = re.search(r"(?<!\S)--port[= ](\d+)", " ".join(cluster.raw["head_start_ray_commands"]))
    return f"{cluster.addresses[0]}:{port[1] if port else PORT}"
