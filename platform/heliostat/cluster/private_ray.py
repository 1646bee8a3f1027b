"""Prepares a private Ray: its environment, the folder of its files, and the fork server of its workers.

    private_ray.ahead(gpus, modules)    # as early as a command knows its workers' needs: imports run in parallel
    connect(...)                        # starts Ray; its workers are forks

Imports neither Ray nor torch.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from heliostat.cluster import private
from heliostat.cluster.fork_server.start import ForkServer, supported
from heliostat.config import workspace

# workers share the cores, so none may start a thread a core
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# glibc gives large blocks back to the system at every free and faults them in again at the next step; keep them. In one arena:
# the others, which all threads but the first take, lie in pieces of 64 MB, given back whole.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30), "MALLOC_ARENA_MAX": "1"}
# torch's memory on GPUs in blocks that grow, rather than in blocks of sizes that later tensors do not fit
GPU_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
GPU_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the names that torch reads
# A private Ray has no dashboard to read these, and twenty processes that report them cost two cores 5 % of their time
SILENT = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0", "RAY_event_stats": "0"}
# Ray Data would start an actor, and ask a Prometheus on this machine, to report how it is used
UNTOLD = {"RAY_DATA_USAGE_DISABLED": "1"}
# Ray keeps as many idle workers as there are CPUs, each of which wakes up 100 times a second; the last end after this long
IDLE = {"RAY_num_workers_soft_limit": "0", "RAY_idle_worker_killing_time_threshold_ms": "20000"}
# Ray holds a driver until its first workers are there, without a deadline, and Ctrl-C does nothing meanwhile. A worker that is
# not there within a minute is given up, and a busy machine's may import for longer: the driver then hung for ever
PATIENT = {"RAY_prestart_worker_first_driver": "0", "RAY_worker_register_timeout_seconds": "600"}
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
# Ray gives these to its workers, and its library reads them when it is imported; the first job of a Ray is always number 1
OF_FORKS = {"RAY_AUTH_MODE": "token", "RAY_JOB_ID": "01000000"}
TASKS = ("ray.data",)  # what all tasks and actors need

_servers: list[ForkServer] = []  # of this process: one at most


def worker_environment(gpus: float) -> dict[str, str]:
    """Returns the environment variables that a training worker starts with. What a user says of torch's allocator stays."""
    if gpus:
        return {} if any(name in os.environ for name in GPU_ALLOCATORS) else GPU_ALLOCATOR
    return {**THREADS, **ALLOCATOR}


def environment(gpus: float) -> dict[str, str]:
    """Returns the environment of a private Ray and all its workers.

    Ray's processes inherit it, so that the ones started ahead fit every task; a runtime environment would start new ones. The
    workers import jobs/ and pipelines/ from the workspace.
    """
    before = {name: value for name, value in os.environ.items() if name not in AUTHENTICATION}
    path = os.pathsep.join(filter(None, [str(workspace.root()), before.get("PYTHONPATH")]))
    token = {"RAY_AUTH_TOKEN_PATH": str(token_file())}
    return {**SILENT, **IDLE, **PATIENT, **URGENT, **before, **worker_environment(gpus), **CONFINED, "PYTHONPATH": path, **token}


def sessions() -> Path:
    """Returns the folder of this user's private Rays: their logs, sockets and tokens.

    Its path is short, because a socket's path has at most 107 characters.
    """
    name = f"heliostat-{os.getuid()}"
    place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / name
    return private.folder(place if len(str(place)) <= SOCKET_PATH else Path("/tmp") / name)


def token_file() -> Path:
    return sessions() / f"token-{os.getpid()}"


def ahead(gpus: float, modules: Sequence[str] = TASKS) -> ForkServer | None:
    """Starts the fork server of a private Ray, which imports these modules; None on a named cluster, or if it isn't supported.

    If there is one already, it stays as it is: workers import what it has not. For workers with GPUs no training module is
    imported ahead: DeepSpeed's import asks CUDA what there is, which a fork could not use afterwards.
    """
    if os.environ.get("RAY_ADDRESS"):
        return None
    if not _servers and supported():
        if not token_file().exists():
            private.write_token(token_file())
        atexit.register(end)
        folder = Path(tempfile.mkdtemp(prefix="z", dir=sessions()))
        _servers.append(ForkServer(folder, {**environment(gpus), **OF_FORKS}, TASKS if gpus else modules))
    return fork_server()


def fork_server() -> ForkServer | None:
    """Returns the fork server of this process's private Ray, if there is one."""
    return _servers[0] if _servers else None


def end() -> None:
    """Ends the fork server, if there is one, and removes the token of the private Ray."""
    while _servers:
        _servers.pop().end()
    token_file().unlink(missing_ok=True)
