"""Connecting the driver to Ray: the cluster we are in or were told of, or a private one on this machine.

`RAY_ADDRESS` (set in every Ray job) names a cluster; otherwise a local Ray starts, with token authentication, no
dashboard, and more logical CPUs than cores, because the data tasks that feed the workers mostly wait for I/O.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from typing import Any

import psutil
import ray

from heliostat import workspace
from heliostat.check import require_gpus
from heliostat.cluster import start

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

END_S = 5.0  # for the processes of a private Ray to end by themselves


def worker_environment(gpus: float) -> dict[str, str]:
    """Environment variables that a training worker starts with."""
    return {} if gpus else {**THREADS, **ALLOCATOR}


def remote_environment(gpus: float) -> dict[str, Any]:
    """The runtime environment of workers on a cluster that is not our own; a private Ray's processes have inherited it."""
    return {"env_vars": worker_environment(gpus)} if os.environ.get("RAY_ADDRESS") else {}


def configure() -> None:
    """What Ray Train takes from the environment of the process that starts a run."""
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
        return
    gpus = min(gpus, require_gpus(gpus)) if gpus else 0  # Ray would hand out as many as it is told of
    # A private Ray's processes inherit this environment, so that the ones started ahead fit every task; a runtime
    # environment would start new ones. The workers import jobs/ and pipelines/ from the workspace.
    before = dict(os.environ)
    path = os.pathsep.join(filter(None, [str(workspace.root()), before.get("PYTHONPATH")]))
    os.environ.update({**SILENT, **IDLE, **URGENT, **before, **worker_environment(gpus), "PYTHONPATH": path})
    try:
        start.init(num_cpus=cpus, num_gpus=gpus or None, include_dashboard=False, **options)
        atexit.register(disconnect)
        if not verbose:
            _without_monitors()
    finally:
        os.environ.clear()
        os.environ.update(before)


def disconnect() -> None:
    """Ends a private Ray, and what is left of it then: now and then an actor's process hangs in its own exit, and would stay."""
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


def _without_monitors() -> None:
    """Ends the processes of a private Ray that do nothing for us, all the time: one looks for new log lines for the driver ten
    times a second, the other is the dashboard's, which starts even where there is no dashboard."""
    node: Any = ray._private.worker._global_node
    node.kill_log_monitor()
    node.kill_dashboard()
