"""Prepares a private Ray: its environment, the folder of its files, and the fork server of its workers.

    private_ray.ahead(gpus, modules)    # call it as soon as the workers' needs are known: the imports run in parallel
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

# workers share the cores, so no worker may start one thread per core
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# By default glibc returns large blocks to the system at every free, and the next step faults them in again. These settings
# keep the blocks, in one arena: the arenas of later threads consist of 64 MB heaps, which glibc returns as a whole.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30), "MALLOC_ARENA_MAX": "1"}
# torch allocates GPU memory in segments that grow, instead of blocks with sizes that later tensors don't fit
GPU_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
GPU_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the names that torch reads
# a private Ray has no dashboard that reads metrics, and reporting them from twenty processes uses 5 % of two cores
SILENT = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0", "RAY_event_stats": "0"}
# by default Ray Data starts an actor and queries a Prometheus on this machine to report its usage
UNTOLD = {"RAY_DATA_USAGE_DISABLED": "1"}
# by default Ray keeps one idle worker per CPU, which wakes up 100 times per second; with this, idle workers end after 20 s
IDLE = {"RAY_num_workers_soft_limit": "0", "RAY_idle_worker_killing_time_threshold_ms": "20000"}
# By default a driver waits for its first workers without a deadline, and Ctrl-C doesn't end it. Ray gives up a worker that
# doesn't register within a minute. On a busy machine imports can take longer, and then the driver would hang forever.
PATIENT = {"RAY_prestart_worker_first_driver": "0", "RAY_worker_register_timeout_seconds": "600"}
# by default Ray starts its workers at niceness 15, so that all other processes of the machine have priority
URGENT = {"RAY_worker_niceness": "0"}

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
# These keep a private Ray and its workers on loopback. Ray replaces loopback addresses by addresses that others can reach,
# except in its mode for systems without cluster support, which the first variable turns on.
CONFINED = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE,
    "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE,
}
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
SOCKET_PATH = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")  # length left for the folder
# Ray passes these to its workers, and Ray's library reads them at import; the first job of a Ray is always number 1
OF_FORKS = {"RAY_AUTH_MODE": "token", "RAY_JOB_ID": "01000000"}
TASKS = ("ray.data",)  # modules that every task and actor needs

_servers: list[ForkServer] = []  # contains this process's fork server, at most one


def worker_environment(gpus: float) -> dict[str, str]:
    """Returns the environment variables for a training worker. Keeps the user's own settings of torch's allocator."""
    if gpus:
        return {} if any(name in os.environ for name in GPU_ALLOCATORS) else GPU_ALLOCATOR
    return {**THREADS, **ALLOCATOR}


def environment(gpus: float) -> dict[str, str]:
    """Returns the environment of a private Ray and all its workers.

    Ray's processes inherit this environment, so a worker that Ray started in advance can run any task. If the variables were in a
    runtime environment instead, Ray would start new workers. The workers import jobs/ and pipelines/ from the workspace.
    """
    before = {name: value for name, value in os.environ.items() if name not in AUTHENTICATION}
    path = os.pathsep.join(filter(None, [str(workspace.root()), before.get("PYTHONPATH")]))
    token = {"RAY_AUTH_TOKEN_PATH": str(token_file())}
    return {**SILENT, **IDLE, **PATIENT, **URGENT, **before, **worker_environment(gpus), **CONFINED, "PYTHONPATH": path, **token}


def sessions() -> Path:
    """Returns the folder of this user's private Rays, with their logs, sockets, and tokens.

    The folder's path is short, because a socket's path may have at most 107 characters.
    """
    name = f"heliostat-{os.getuid()}"
    place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / name
    return private.folder(place if len(str(place)) <= SOCKET_PATH else Path("/tmp") / name)


def token_file() -> Path:
    """Returns the path of the token of this process's private Ray."""
    return sessions() / f"token-{os.getpid()}"


def ahead(gpus: float, modules: Sequence[str] = TASKS) -> ForkServer | None:
    """Starts and returns the fork server of a private Ray. The fork server imports `modules`.

    Returns None if RAY_ADDRESS names a cluster, or if forking isn't supported. If a fork server already runs, this server stays
    unchanged, and the server's workers import missing modules themselves. For workers with GPUs, the server imports no training
    module, because the import of DeepSpeed queries CUDA. After such a query, forks can't use CUDA.
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
    """Returns the fork server of this process's private Ray; None if there is none."""
    return _servers[0] if _servers else None


def end() -> None:
    """Ends the fork server, if there is one, and removes the token of the private Ray."""
    while _servers:
        _servers.pop().end()
    token_file().unlink(missing_ok=True)
