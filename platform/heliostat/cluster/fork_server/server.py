"""Imports modules, then forks a process for every request. The command is `server SOCKET MODULES`, with commas between the
modules.

The server has only one thread when it forks, because it never starts Ray, a process group, or CUDA. Ray's library reads the job's
id when it is imported, so all forks are workers of one job.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import select
import shlex
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from heliostat.cluster.fork_server.start import END_S, ENTRY

CONTEXT = "--serialized-runtime-env-context="
LIMIT = 1 << 20  # maximum bytes of a request
JOB, RAYLET = "RAY_JOB_ID", "RAY_RAYLET_PID"
NO_JOB = "ffffffff"  # the job id of a worker that Ray starts before it knows the worker's job
PARENT_DEATH_SIGNAL = 1  # an option of prctl


@dataclass
class ForkRequest:
    """Holds a command that Ray started through the launcher."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str


def main() -> None:
    """Runs the fork server: forks a process for each request, until standard input ends. A fork runs the requested command."""
    address = sys.argv[1]
    os.environ[RAYLET] = str(os.getpid())  # Ray's workers end with this process, which ends with the raylet's parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the forks
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)  # in a folder that only this user may enter
        listener.listen()
        prepare(name for name in sys.argv[2].split(",") if name)
        request = _serve(listener)
    if request:
        _become(request)
    else:
        _end_workers()
        shutil.rmtree(Path(address).parent, ignore_errors=True)


def prepare(modules: Iterable[str]) -> None:
    """Imports modules for all later forks. Raises SystemExit if forks would lack threads of this process, or would draw the same
    random ids."""
    with own_ids():
        for module in modules:
            with contextlib.suppress(ImportError, ValueError):  # for example, the module of an extra that isn't installed
                importlib.import_module(module)
    if threading.active_count() > 1:
        raise SystemExit("the imported modules have started threads, which forks would lose. Ray starts the workers instead")
    if _next_id() == _next_id():
        raise SystemExit("Ray has already drawn random numbers, so all forks would draw the same numbers and use the same names")
    gc.freeze()  # a garbage collection writes to each object that it visits, and so would copy the forks' shared memory


@contextlib.contextmanager
def own_ids() -> Iterator[None]:
    """Makes new actor classes get their ids from the system, not from Ray's random numbers, within the context.

    If Ray drew random numbers before a fork, all forks would draw the same numbers.
    """
    import ray.actor

    kind = ray.actor.ActorClassID

    class DrawnId:
        @staticmethod
        def from_random() -> object:
            return kind(os.urandom(kind.size()))

    ray.actor.ActorClassID = DrawnId  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        ray.actor.ActorClassID = kind  # type: ignore[misc]


def _next_id() -> bytes:
    """Returns the first random id that Ray draws in a fork."""
    import ray

    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writable, ray.ObjectID.from_random().binary())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as drawn:
        return drawn.read()


# requests ----------------------------------------------------------------------------------------------------------------


def worker(request: ForkRequest) -> ForkRequest | None:
    """Reads Ray's command for a worker, and applies the worker's runtime environment. Returns None if a fork of this process
    can't be that worker.

    A fork can't be a worker of another job. A fork's runtime environment can contain only variables and a working folder.
    """
    words, variables, folder = list[str](), dict[str, str](), request.folder
    program = next(i for i, word in enumerate(request.arguments) if word.endswith(ENTRY))
    for word in request.arguments[program:]:
        if word.startswith(CONTEXT):
            context = json.loads(word.removeprefix(CONTEXT))
            variables = context.pop("env_vars", {})
            match shlex.split(" ".join(context.get("command_prefix", []))):
                case ["cd", where, "&&"]:
                    folder = where
                    del context["command_prefix"]
            if any(value for name, value in context.items() if (name, value) != ("py_executable", sys.executable)):
                return None
        elif not word.startswith("--language="):
            words.append(word)
    environment = request.environment | variables
    same_job = environment.get(JOB, NO_JOB) in (NO_JOB, os.environ[JOB])
    return ForkRequest(words, environment, folder) if same_job else None


def receive(connection: socket.socket, descriptors: int = 3) -> tuple[ForkRequest, list[int]]:
    """Receives a request, and the file descriptors of the launcher's standard streams. Raises ValueError for an incomplete
    request."""
    data, received, _, _ = socket.recv_fds(connection, LIMIT, descriptors)
    while not data.endswith(b"\n"):
        more = connection.recv(LIMIT)
        if not more or len(data) > LIMIT:
            for one in received:
                os.close(one)
            raise ValueError("incomplete request")
        data += more
    return ForkRequest(**json.loads(data)), received


def _serve(listener: socket.socket) -> ForkRequest | None:
    """Forks for each request. In the new process, returns the request. In this process, returns None when standard input ends."""
    server = os.getpid()
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        connection.settimeout(END_S)
        wanted, streams, pid = None, list[int](), None
        # if the launcher has ended, Ray asks again; for other commands, or if memory is full, the launcher runs Python itself
        with contextlib.suppress(OSError, ValueError, TypeError, StopIteration):
            request, streams = receive(connection)
            wanted = worker(request)
            pid = os.fork() if wanted else None
        if pid == 0:
            _end_with(server)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
        elif pid:
            with contextlib.suppress(OSError):
                connection.sendall(b"%d\n" % pid)
        connection.close()
        for stream in streams:
            os.close(stream)
        if pid == 0:
            return wanted
    return None


def _end_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends. Ray's own check isn't enough, because Ray's check counts a zombie
    as alive."""
    ctypes.CDLL(None, use_errno=True).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def _end_workers() -> None:
    """Kills the process groups of this process's forks: the workers and the processes that they started."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # so that the id of a worker that ends meanwhile isn't reused
    for child in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError):  # the fork doesn't have its own group yet; the kernel kills it
            os.killpg(child.pid, signal.SIGKILL)


def _become(request: ForkRequest) -> None:
    """Runs the worker's program in this process, as in a new process."""
    os.setsid()  # Ray ends a worker together with its process group
    with contextlib.suppress(OSError):  # Ray's own value: if memory runs out, the kernel ends workers first
        Path("/proc/self/oom_score_adj").write_text(request.environment.get("RAY_worker_oom_score_adjustment", "1000"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.argv = request.arguments
    sys.path[0] = str(Path(sys.argv[0]).parent)
    for entry in reversed(request.environment.get("PYTHONPATH", "").split(os.pathsep)):
        if entry and entry not in sys.path:
            sys.path.insert(1, entry)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
