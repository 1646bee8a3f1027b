"""Runs the zygote: imports modules, then forks a process for every request: `zygote_server SOCKET EARLY MORE DRIVERS`, modules
with commas between them.

It has one thread when it forks: it never starts Ray, a process group or CUDA. Ray's library reads a job's id when it is imported,
so that all forks of a process that has imported it are workers of one job. A zygote that is not of one job has imported only what
does not import Ray, and has a fork for each job, a nursery, which imports the rest and forks that job's workers. The nursery of
the job that comes next, by Ray's numbers, is made when there is nothing else to do. A run's driver, which Ray gives a job's id
only when it connects, is a fork of another nursery.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from heliostat.cluster.package_digest import package_digest
from heliostat.cluster.zygote import END_S, ENTRY

CONTEXT = "--serialized-runtime-env-context="
LIMIT = 1 << 20  # bytes of a request
BACKLOG = 256
JOB, RAYLET = "RAY_JOB_ID", "RAY_RAYLET_PID"
NO_JOB = "ffffffff"  # a worker that Ray starts before it is known for what
DRIVER = "driver"  # in the place of a job's id: of the nursery for drivers
NURSERIES = 4  # jobs that a zygote keeps forks for
LATEST_S = 120.0  # without a request, before a zygote of any job begins with its imports
PARENT_DEATH_SIGNAL = 1  # of prctl
IDLE_S = 15.0  # without a request, before the next job's nursery is made: a job that starts needs the processor itself


@dataclass
class ForkRequest:
    """Holds a command that a launcher was asked to run."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str

    @property
    def drives(self) -> bool:
        """Tells whether this is a command of ours, `python -m heliostat ...`, not one of Ray's for a worker."""
        return self.arguments[:2] == ["-m", "heliostat"]


@dataclass
class Asked:
    """Holds a request with the standard streams and the connection of whoever asks."""

    request: ForkRequest
    streams: list[int]
    connection: socket.socket

    def close(self) -> None:
        self.connection.close()
        for stream in self.streams:
            os.close(stream)


def main() -> None:
    """Serves requests until standard input ends; in the forks, runs what was requested."""
    place, early, modules, drivers = (sys.argv[1], *([name for name in names.split(",") if name] for names in sys.argv[2:]))
    os.environ[RAYLET] = zygote = str(os.getpid())  # Ray's workers end when it does: it ends with the raylet's own parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps what was forked
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(place)  # in a folder that nobody else may enter
        listener.listen(BACKLOG)
        if JOB in os.environ:
            prepare([*early, *modules], ray=True)
            request = _serve(_accepted(listener), dependent=True)
        else:
            # a node that starts needs the processor itself; a head may never have work, another is to spare for a lost one
            select.select([listener, sys.stdin], [], [], None if drivers else LATEST_S)
            prepare(early)
            request = _Nurseries(modules, drivers).serve(listener)
    if request:
        _become(request)
    elif os.getpid() == int(zygote):
        if JOB in os.environ:
            _end_workers()
        shutil.rmtree(Path(place).parent, ignore_errors=True)


def prepare(modules: Iterable[str], ray: bool = False) -> None:
    """Imports modules for all later forks; SystemExit if those could not be told apart, or would lose something."""
    with own_ids() if ray else contextlib.nullcontext():
        for module in modules:
            with contextlib.suppress(ImportError, ValueError):  # of an extra that is not installed; an empty name
                importlib.import_module(module)
    if threading.active_count() > 1:
        raise SystemExit(f"{modules} have started threads, which a fork would lose")
    if ray and _next_id() == _next_id():
        raise SystemExit("Ray has drawn random numbers already: all forks would draw the same ones, and name things alike")
    gc.freeze()  # a collection writes to each object that it looks at, and so would copy all that the forks share


@contextlib.contextmanager
def own_ids() -> Iterator[None]:
    """Keeps Ray's random numbers unused inside: they would go on alike in all forks. Actor classes draw an id when defined."""
    import ray.actor

    kind: Any = ray.actor.ActorClassID

    class Drawn:
        @staticmethod
        def from_random() -> object:
            return kind(os.urandom(kind.size()))

    ray.actor.ActorClassID = Drawn  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        ray.actor.ActorClassID = kind  # type: ignore[misc]


def _next_id() -> bytes:
    """Returns the random id that Ray would give first in a fork."""
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
    """Reads Ray's command for a worker, with its runtime environment applied; None if no fork of this process can be that worker.

    That is one whose runtime environment asks for more than variables and a folder, or brings other code of heliostat's.
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
    return _of_our_code(ForkRequest(words, request.environment | variables, folder))


def _of_our_code(request: ForkRequest) -> ForkRequest | None:
    return request if _is_our_code(request.environment.get("PYTHONPATH", "")) else None


@functools.cache
def _is_our_code(path: str) -> bool:
    """Tells whether the package that PYTHONPATH leads to, if it leads to one, has the same files as the one that runs here."""
    places = (Path(entry, "heliostat") for entry in path.split(os.pathsep) if entry)
    there = next((place for place in places if (place / "__init__.py").exists()), None)
    here = Path(__file__).parents[1]
    return there is None or there == here or package_digest(there) == package_digest(here)


def receive(connection: socket.socket, descriptors: int = 3) -> tuple[ForkRequest, list[int]]:
    """Receives a request and descriptors: the three standard streams of whoever sent it."""
    data, received, _, _ = socket.recv_fds(connection, LIMIT, descriptors)
    while not data.endswith(b"\n"):
        more = connection.recv(LIMIT)
        if not more or len(data) > LIMIT:
            for one in received:
                os.close(one)
            raise ValueError("half a request")
        data += more
    return ForkRequest(**json.loads(data)), received


def _accepted(listener: socket.socket, idle_s: float | None = None) -> Iterator[Asked | None]:
    """Yields requests for workers until standard input ends, and None after each `idle_s` without one."""
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [], idle_s)
        if sys.stdin in readable:
            return
        if not readable:
            yield None
            continue
        connection, _ = listener.accept()
        connection.settimeout(END_S)
        streams: list[int] = []
        try:
            request, streams = receive(connection)
            wanted = _of_our_code(request) if request.drives else worker(request)
        except (OSError, ValueError, TypeError, StopIteration):  # whoever asked has gone, and Ray asks anew; no command of Ray's
            wanted = None
        asked = Asked(wanted or ForkRequest([], {}, ""), streams, connection)
        if wanted is None or (JOB in os.environ and _nursery(wanted)[1] not in (NO_JOB, os.environ[JOB])):
            asked.close()
        else:
            yield asked


def _handed(channel: socket.socket) -> Iterator[Asked]:
    """Yields the requests that a zygote hands to its nursery, until the channel ends."""
    while True:
        try:
            request, (connection, *streams) = receive(channel, 4)
        except (OSError, ValueError):
            return
        yield Asked(request, streams, socket.socket(fileno=connection))


def _serve(requests: Iterable[Asked | None], dependent: bool = False) -> ForkRequest | None:
    """Forks for each request; returns the request in the new process, and None here when there are no more.

    The kernel kills `dependent` forks when this process ends.
    """
    server = os.getpid()
    for asked in requests:
        if asked is None:
            continue
        try:
            pid = os.fork()
        except OSError:  # no process or memory to be had: whoever asked runs Python itself
            asked.close()
            continue
        if not pid:
            if dependent:
                _end_with(server)
            for number, stream in enumerate(asked.streams):
                os.dup2(stream, number)
                os.close(stream)
            if asked.request.drives:
                _attend(asked.connection)
            asked.connection.close()
            return asked.request
        with contextlib.suppress(OSError):
            if not asked.request.drives:
                asked.connection.sendall(b"%d\n" % pid)
        asked.close()
    return None


def _end_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends.

    Ray's own check of the process that RAY_RAYLET_PID named at its import is not enough: a zombie, or a process that lives longer
    than the zygote, passes it.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before the call
        os._exit(1)


def _end_workers() -> None:
    """Kills the process groups of this process's forks: the workers, and the processes that those have started."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a worker that ends meanwhile keeps its id
    for child in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet; the kernel kills it
            os.killpg(child.pid, signal.SIGKILL)


def _attend(connection: socket.socket) -> None:
    """Forks the process that runs the command, and returns in that one; the other tells whoever asks its id, and how it ended.

    Once nobody is there to be told, the command is killed.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        return
    for number in range(3):
        os.close(number)
    ended = os.pidfd_open(pid)
    try:
        connection.sendall(b"%d\n" % pid)
        gone = ended not in select.select([connection.fileno(), ended], [], [])[0]
    except OSError:  # whoever asked has given up, and runs the command itself
        gone = True
    if gone:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % code)
    os._exit(0)


class _Nurseries:
    """Keeps a fork for each of the jobs that a raylet asked for workers of lately, one for its next job, and one for drivers."""

    def __init__(self, modules: list[str], drivers: list[str]) -> None:
        self.modules, self.drivers = modules, drivers
        self._channels: dict[tuple[str, str], socket.socket] = {}  # by raylet and job, the one that was asked for last at the end
        self._newest = 0

    def serve(self, listener: socket.socket) -> ForkRequest | None:
        """Hands each request to its nursery; returns the request in a worker's process, and None in all others."""
        for asked in _accepted(listener, IDLE_S):
            key = _nursery(asked.request) if asked else self._ahead()
            if key and key not in self._channels and (inside := self._fork(*key)):
                listener.close()
                if asked:
                    asked.close()
                return self._raise(inside, *key)
            if asked and key:
                self._hand(asked, key)
        return None

    def _ahead(self) -> tuple[str, str] | None:
        """Returns the key of a nursery that is not there yet, and will be asked for; closes those of dead raylets."""
        for key in [key for key in self._channels if not Path("/proc", key[0]).exists()]:
            self._channels.pop(key).close()
        job = (self._newest + 1).to_bytes(4, "little").hex()
        keys = [*((raylet, job) for raylet, kind in self._channels if kind != DRIVER), *([("", DRIVER)] if self.drivers else [])]
        return next((key for key in keys if key not in self._channels), None)

    def _fork(self, raylet: str, job: str) -> socket.socket | None:
        """Forks a nursery; returns the inner end of its channel in it, and None in the zygote."""
        outer, inner = socket.socketpair()
        if not os.fork():
            outer.close()
            return inner
        inner.close()
        self._channels[raylet, job] = outer
        old = [key for key in self._channels if key[0] == raylet]
        for key in old[:-NURSERIES]:
            self._channels.pop(key).close()
        return None

    def _raise(self, channel: socket.socket, raylet: str, job: str) -> ForkRequest | None:
        """Serves the workers of one job, in its nursery."""
        for other in self._channels.values():
            other.close()
        if job == DRIVER:
            del os.environ[RAYLET]  # Ray gives it a job when it connects
            prepare(self.drivers, ray=True)
        else:
            os.environ |= {JOB: job, RAYLET: raylet}
            prepare(self.modules, ray=True)
        return _serve(_handed(channel))

    def _hand(self, asked: Asked, key: tuple[str, str]) -> None:
        channel = self._channels.pop(key)
        if key[1] not in (NO_JOB, DRIVER):
            self._newest = max(self._newest, int.from_bytes(bytes.fromhex(key[1]), "little"))
        try:
            told = json.dumps(asdict(asked.request)).encode() + b"\n"
            socket.send_fds(channel, [told], [asked.connection.fileno(), *asked.streams])
            self._channels[key] = channel
        except OSError:  # it has ended: whoever asks runs Python itself
            channel.close()
        asked.close()


def _nursery(request: ForkRequest) -> tuple[str, str]:
    if request.drives:
        return "", DRIVER
    return request.environment.get(RAYLET, ""), request.environment.get(JOB, NO_JOB)


def _become(request: ForkRequest) -> None:
    """Runs the request's program in this process, as if it had been started for it."""
    os.setsid()  # Ray ends a worker's process group with it
    if not request.drives:
        with contextlib.suppress(OSError):  # as Ray has the kernel do: out of memory, it ends workers first
            Path("/proc/self/oom_score_adj").write_text(request.environment.get("RAY_worker_oom_score_adjustment", "1000"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.argv = request.arguments[1:] if request.drives else request.arguments
    sys.path[0] = request.folder if request.drives else str(Path(sys.argv[0]).parent)
    for entry in reversed(request.environment.get("PYTHONPATH", "").split(os.pathsep)):
        if entry and entry not in sys.path:
            sys.path.insert(1, entry)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    if request.drives:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
