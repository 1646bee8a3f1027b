"""Connects the driver to Ray: to the cluster that it runs in or that is named, or to a private one on this machine.

`RAY_ADDRESS` (set in every Ray job) names a cluster; otherwise a local Ray starts, with no dashboard, and more logical CPUs than
cores, because the data tasks that feed the workers mostly wait for I/O. It is this user's alone: it listens on loopback, requires
a token that is made for it, and keeps its files, sockets and the token in a folder that nobody else may enter.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

from heliostat.cluster import private, start
from heliostat.cluster.capacity import require_gpus
from heliostat.config import workspace

log = logging.getLogger(__name__)

# workers share the cores, so none may start a thread a core
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# glibc gives large blocks back to the system at every free and faults them in again at the next step; keep them. In one arena:
# the others, which all threads but the first take (Ray Train trains in one of those), lie in pieces of 64 MB, given back whole.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30), "MALLOC_ARENA_MAX": "1"}
# A private Ray has no dashboard to read these, and twenty processes that report them cost two cores 5 % of their time
SILENT = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0", "RAY_event_stats": "0"}
# Ray keeps as many idle workers as there are CPUs, each of which wakes up 100 times a second; the last end after this long
IDLE = {"RAY_num_workers_soft_limit": "0", "RAY_idle_worker_killing_time_threshold_ms": "20000"}
# Ray would start its workers at niceness 15, where whatever else the machine does comes first
URGENT = {"RAY_worker_niceness": "0"}

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
# Of a private Ray and its workers. Ray puts an address that others reach in the place of a loopback one, unless it is in the mode
# for systems where it has no clusters, which the first variable turns on.
CONFINED = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE,
    "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE,
}
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
SOCKET_PATH = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")  # what is left for the folder

END_S = 5.0  # for the processes of a private Ray to end by themselves


def worker_environment(gpus: float) -> dict[str, str]:
    """Returns the environment variables that a training worker starts with."""
    return {} if gpus else {**THREADS, **ALLOCATOR}


def remote_environment(gpus: float) -> dict[str, Any]:
    """Returns the runtime environment of workers on a cluster named by RAY_ADDRESS; empty on a private Ray, which inherits it."""
    return {"env_vars": worker_environment(gpus)} if os.environ.get("RAY_ADDRESS") else {}


def configure() -> None:
    """Sets the environment variables that Ray Train reads in the process that starts a run."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # the driver looks for itself
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")  # then there may be room for fewer
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")  # how soon a dead worker, or the end, is seen


def connect(cpus: int, gpus: int = 0, verbose: bool = False) -> None:
    """Joins or starts Ray with room for `cpus` logical CPUs; does nothing if the process is already connected."""
    configure()
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        start.init(address="auto", **options)
        if ray.available_resources().get("CPU", 0.0) < 1:
            log.warning("none of the cluster's %g CPUs is free; its tasks wait for one", ray.cluster_resources().get("CPU", 0.0))
        return
    gpus = min(gpus, require_gpus(1)) if gpus else 0  # Ray would hand out as many as it is told of
    with _confined(gpus):
        start.init(
            address="local",  # never what another user says in /tmp/ray that runs here
            num_cpus=cpus,
            num_gpus=gpus or None,
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            _temp_dir=str(sessions() / "ray"),  # Ray opens this folder itself to everybody
            **options,
        )
        atexit.register(disconnect)
        if not verbose:
            _without_monitors()


def sessions() -> Path:
    """Returns the folder of this user's private Rays: their logs, sockets and tokens.

    Its path is short, because a socket's path has at most 107 characters.
    """
    name = f"heliostat-{os.getuid()}"
    place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / name
    return private.folder(place if len(str(place)) <= SOCKET_PATH else Path("/tmp") / name)


def _token_file() -> Path:
    return sessions() / f"token-{os.getpid()}"


@contextlib.contextmanager
def _confined(gpus: int) -> Iterator[None]:
    """Sets the environment so that a Ray that starts inside the context is private; restores it afterwards.

    Ray's processes inherit this environment, so that the ones started ahead fit every task; a runtime environment would start new
    ones. The workers import jobs/ and pipelines/ from the workspace.
    """
    from ray._private import ray_constants

    private.tighten(Path.home() / ".ray" / "auth_token")
    before, clusters = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    path = os.pathsep.join(filter(None, [str(workspace.root()), before.get("PYTHONPATH")]))
    private.write_token(_token_file())
    os.environ.update({**SILENT, **IDLE, **URGENT, **before, **worker_environment(gpus), **CONFINED, "PYTHONPATH": path})
    for name in AUTHENTICATION:  # with the mode unset, Ray turns authentication on whatever the mode was when it was imported
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())
    loader: Any = ray._raylet
    loader.AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = False  # read when Ray was imported
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        os.environ.clear()
        os.environ.update(before)


def disconnect() -> None:
    """Ends a private Ray and kills what remains of it: an actor's process sometimes hangs in its own exit."""
    if not ray.is_initialized():
        return
    node: Any = ray._private.worker._global_node
    workers: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):  # the raylet has died: its workers end without it
        workers = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    ray.shutdown()
    for process in psutil.wait_procs(workers, timeout=END_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _token_file().unlink(missing_ok=True)


def _without_monitors() -> None:
    """Ends the two processes of a private Ray that only cost time.

    One polls for new log lines for the driver ten times a second; the other is the dashboard's, which starts even without a
    dashboard.
    """
    node: Any = ray._private.worker._global_node
    node.kill_log_monitor()
    node.kill_dashboard()
