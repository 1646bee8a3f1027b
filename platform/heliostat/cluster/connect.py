"""Connecting the driver to Ray: the cluster we are in or were told of, or a private one on this machine.

`RAY_ADDRESS` (set in every Ray job) names a cluster; otherwise a local Ray starts, with token authentication, no
dashboard, and more logical CPUs than cores, because the data tasks that feed the workers mostly wait for I/O.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from heliostat import workspace


def connect(cpus: int, gpus: int = 0, verbose: bool = False) -> None:
    """Joins or starts Ray with room for `cpus` logical CPUs; does nothing if the process is already connected."""
    if ray.is_initialized():
        return
    # the workers import jobs/ and pipelines/ from the workspace, and must not oversubscribe the cores with threads
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(workspace.root()), os.environ.get("PYTHONPATH")]))}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    common: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **common)
    else:
        ray.init(num_cpus=cpus, num_gpus=gpus or None, include_dashboard=False, runtime_env={"env_vars": env}, **common)
