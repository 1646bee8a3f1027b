"""Connects the driver to Ray: to the cluster that RAY_ADDRESS names, or to a private Ray on this machine.

`RAY_ADDRESS` is set in every Ray job. If `RAY_ADDRESS` isn't set, a private Ray without a dashboard starts. A private Ray has
more logical CPUs than the machine has cores, because the data tasks that feed the workers mostly wait for I/O.

Only this user can use a private Ray. A private Ray listens on loopback, requires its own token, and keeps its files, sockets,
and token in a folder that only this user may enter.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray

from heliostat.cluster import private, private_ray, processes, ray_internals
from heliostat.cluster.capacity import require_gpus
from heliostat.cluster.private_ray import AUTHENTICATION, LOOPBACK, UNTOLD, token_file, worker_environment
from heliostat.errors import ClusterError
from heliostat.text import brief

log = logging.getLogger(__name__)

END_S = 5.0  # time in which the processes of a private Ray can end by themselves


def remote_environment(gpus: float) -> dict[str, dict[str, str]]:
    """Returns the runtime environment of workers on a cluster that RAY_ADDRESS names.

    Returns an empty mapping for a private Ray, whose workers inherit the variables.
    """
    return {"env_vars": worker_environment(gpus)} if os.environ.get("RAY_ADDRESS") else {}


def connect(cpus: int, gpus: int = 0, verbose: bool = False) -> None:
    """Joins the cluster that RAY_ADDRESS names. If RAY_ADDRESS isn't set, starts a private Ray with `cpus` logical CPUs. A second
    call does nothing.

    `gpus`: number of GPUs of a private Ray, at most the number in this machine. `verbose`: whether to show Ray's logs and the
    workers' output. Raises ConfigError if `gpus` isn't 0 and this machine has no GPU. Raises ClusterError if Ray doesn't
    start.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name, value in UNTOLD.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    options: dict[str, object] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        init(address="auto", **options)
        if ray.available_resources().get("CPU", 0.0) < 1:
            log.warning(
                "none of the cluster's %g CPUs is free, so the tasks of this command wait for a free CPU",
                ray.cluster_resources().get("CPU", 0.0),
            )
        return
    gpus = min(gpus, require_gpus(1)) if gpus else 0  # Ray itself doesn't check that the GPUs exist
    with _confined(gpus), _without_monitors(verbose), _in_own_groups():
        init(
            address="local",  # not the address in /tmp/ray, because other users can write to that file
            num_cpus=cpus,
            num_gpus=gpus or None,
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            _temp_dir=str(private_ray.sessions() / "ray"),  # Ray itself would open this folder to all users
            **options,
        )
        atexit.register(disconnect)


@contextlib.contextmanager
def _confined(gpus: int) -> Iterator[None]:
    """Sets the environment so that a Ray that starts within the context is private. Restores the environment afterwards."""
    from ray._private import ray_constants

    private.tighten(Path.home() / ".ray" / "auth_token")
    before, clusters = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(private_ray.environment(gpus))
    for name in AUTHENTICATION:  # if the mode isn't set, Ray turns authentication on; the mode at Ray's import doesn't matter
        os.environ.pop(name, None)
    if not token_file().exists():
        private.write_token(token_file())
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file())
    loader: Any = ray._raylet
    loader.AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read the variable at import
    server = private_ray.ahead(gpus)
    try:
        runs = server and os.access(server.launcher, os.X_OK)  # False if the system forbids to execute temporary files
        with _forking(server.launcher) if server and runs else contextlib.nullcontext():
            yield
        if server and (not runs or server.process.poll() is not None):
            why = f"exit code {server.process.poll()}" if runs else f"{server.launcher} can't be executed"
            log.warning("each worker takes some seconds to start, because the fork server isn't running (%s)", why)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _forking(launcher: Path) -> Iterator[None]:
    """Lets Ray start its Python processes through the launcher, without the dashboard's agent. Applies to a Ray that starts
    within the context.

    Replaces Ray's check of the agent's libraries too, because the check would import these libraries into this process, which
    takes a second.
    """
    absent = ImportError("a private Ray has no dashboard")
    executable = patch.object(sys, "executable", str(launcher))
    with executable, patch.object(ray._private.utils, "get_dashboard_dependency_error", lambda: absent):
        yield


@contextlib.contextmanager
def _in_own_groups() -> Iterator[None]:
    """Gives Ray's processes their own process groups. Applies to a Ray that starts within the context.

    Without these groups, a signal to this process's group would end Ray before the last checkpoint. The context does nothing if
    the kernel can't end Ray's processes together with this process, because then Ray itself ends the complete group.
    """
    from ray._private import services, utils

    if not utils.detect_fate_sharing_support():
        yield
        return
    with patch.object(services, "ConsolePopen", functools.partial(services.ConsolePopen, process_group=0)):
        yield


def disconnect() -> None:
    """Leaves a cluster, or ends a private Ray. Kills the private Ray's remaining processes, because an actor's process may hang
    while it exits."""
    if not ray.is_initialized():
        return
    node = ray_internals.own_node()
    if "raylet" not in node.all_processes:  # this Ray belongs to a cluster, which keeps running
        ray.shutdown()
        return
    server = private_ray.fork_server()
    parents = [node.all_processes["raylet"][0].process.pid, *([server.process.pid] if server else [])]
    workers = [worker for parent in parents for worker in processes.descendants(parent)]
    ray.shutdown()
    _, left = psutil.wait_procs(workers, timeout=END_S)
    private_ray.end()  # this also kills the forks
    processes.stop(left)


@contextlib.contextmanager
def _without_monitors(verbose: bool) -> Iterator[None]:
    """Prevents Ray from starting processes that a private Ray doesn't need. Applies to a Ray that starts within the context.

    Each of these processes would cost a second of CPU time:

    - the autoscaler's process
    - the dashboard's process, which Ray starts even without a dashboard
    - unless `verbose`, the log monitor, which polls for new log lines for the driver ten times per second

    The dashboard's agent can't be left out, because the raylet waits for an agent. So `_forking` replaces it.
    """
    from ray._private.node import Node

    def nothing(node: Node, **_: object) -> None:
        node._webui_url = ""

    names = ["start_monitor", "start_api_server", *([] if verbose else ["start_log_monitor"])]
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, nothing)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


log = logging.getLogger(__name__)
TRIES = 2


def init(**options: Any) -> None:
    """Calls `ray.init`, and tries a second time if the first call fails. Raises ClusterError if both calls fail.

    Ray gives its processes 30 s to start, but a busy machine may need more time.
    """
    for left in reversed(range(TRIES)):
        before = _children()
        try:
            ray.init(**options)
        except BaseException as e:
            _end_new(before)
            if not isinstance(e, Exception):
                raise
            if not left:
                raise ClusterError(
                    f"Ray didn't start in {TRIES} attempts: {brief(e)}. Check the machine's load, memory, and disk"
                ) from e
            log.warning("Ray didn't start (%s). Trying once more", brief(e))
        else:
            return


def _children() -> set[psutil.Process]:
    return set(processes.descendants(os.getpid()))


def _end_new(before: set[psutil.Process]) -> None:
    """Ends the processes that a failed start left running: all children of this process that aren't in `before`."""
    with contextlib.suppress(Exception):  # the start may have failed at any point
        ray.shutdown()
    processes.stop(_children() - before, END_S)
