"""Connects the driver to Ray: to the cluster that it runs in or that is named, or to a private one on this machine.

`RAY_ADDRESS` (set in every Ray job) names a cluster; otherwise a local Ray starts, with no dashboard, and more logical CPUs than
cores, because the data tasks that feed the workers mostly wait for I/O. It is this user's alone: it listens on loopback, requires
a token that is made for it, and keeps its files, sockets and the token in a folder that only this user may enter.
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

END_S = 5.0  # for the processes of a private Ray to end by themselves


def remote_environment(gpus: float) -> dict[str, dict[str, str]]:
    """Returns the runtime environment of workers on a cluster named by RAY_ADDRESS; empty on a private Ray, which inherits it."""
    return {"env_vars": worker_environment(gpus)} if os.environ.get("RAY_ADDRESS") else {}


def connect(cpus: int, gpus: int = 0, verbose: bool = False) -> None:
    """Joins or starts Ray with room for `cpus` logical CPUs; does nothing if the process is already connected."""
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
                "none of the cluster's %g CPUs is free, so its tasks wait for one", ray.cluster_resources().get("CPU", 0.0)
            )
        return
    gpus = min(gpus, require_gpus(1)) if gpus else 0  # Ray would hand out as many as it sees
    with _confined(gpus), _without_monitors(verbose), _in_own_groups():
        init(
            address="local",  # never what another user says in /tmp/ray that runs here
            num_cpus=cpus,
            num_gpus=gpus or None,
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            _temp_dir=str(private_ray.sessions() / "ray"),  # Ray opens this folder itself to everybody
            **options,
        )
        atexit.register(disconnect)


@contextlib.contextmanager
def _confined(gpus: int) -> Iterator[None]:
    """Sets the environment so that a Ray that starts inside the context is private; restores it afterwards."""
    from ray._private import ray_constants

    private.tighten(Path.home() / ".ray" / "auth_token")
    before, clusters = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(private_ray.environment(gpus))
    for name in AUTHENTICATION:  # with the mode unset, Ray turns authentication on whatever the mode was when it was imported
        os.environ.pop(name, None)
    if not token_file().exists():
        private.write_token(token_file())
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file())
    loader: Any = ray._raylet
    loader.AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = False  # read when Ray was imported
    server = private_ray.ahead(gpus)
    try:
        runs = server and os.access(server.launcher, os.X_OK)  # not where temporary files may not be executed
        with _forking(server.launcher) if server and runs else contextlib.nullcontext():
            yield
        if server and (not runs or server.process.poll() is not None):
            why = f"exit code {server.process.poll()}" if runs else f"{server.launcher} can't be executed"
            log.warning("workers take some seconds each to start, because the fork server isn't running (%s)", why)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _forking(launcher: Path) -> Iterator[None]:
    """Makes a Ray that starts inside start what it has in Python by the launcher, which runs no agent of a dashboard.

    Ray would look whether the agent's libraries can be imported by importing them here: a second.
    """
    absent = ImportError("a private Ray has no dashboard")
    executable = patch.object(sys, "executable", str(launcher))
    with executable, patch.object(ray._private.utils, "get_dashboard_dependency_error", lambda: absent):
        yield


@contextlib.contextmanager
def _in_own_groups() -> Iterator[None]:
    """Keeps signals to this process's group from a Ray that starts inside, which would end before a last checkpoint.

    Only where the kernel ends them with this process: elsewhere Ray itself ends the whole group.
    """
    from ray._private import services, utils

    if not utils.detect_fate_sharing_support():
        yield
        return
    with patch.object(services, "ConsolePopen", functools.partial(services.ConsolePopen, process_group=0)):
        yield


def disconnect() -> None:
    """Leaves a cluster, or ends a private Ray and kills what is left of it: an actor's process may hang in its own exit."""
    if not ray.is_initialized():
        return
    node = ray_internals.own_node()
    if "raylet" not in node.all_processes:  # a cluster's, which runs on
        ray.shutdown()
        return
    server = private_ray.fork_server()
    parents = [node.all_processes["raylet"][0].process.pid, *([server.process.pid] if server else [])]
    workers = [worker for parent in parents for worker in processes.descendants(parent)]
    ray.shutdown()
    _, left = psutil.wait_procs(workers, timeout=END_S)
    private_ray.end()  # which kills its forks
    processes.stop(left)


@contextlib.contextmanager
def _without_monitors(verbose: bool) -> Iterator[None]:
    """Keeps a Ray that starts inside from starting three processes that a private one has no use for, each a second of CPU.

    The autoscaler's, the dashboard's, which starts even without a dashboard, and, unless `verbose`, the one that polls ten times
    a second for new log lines for the driver. A fourth, the dashboard's agent, is replaced (`_forking`): the raylet waits for it.
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
    """Calls `ray.init`, again if it fails once; ClusterError if it fails twice.

    Ray gives its processes 30 s to start, and a busy machine may need more.
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
    """Ends the processes that a failed start has left."""
    with contextlib.suppress(Exception):  # it may have got anywhere
        ray.shutdown()
    processes.stop(_children() - before, END_S)
