"""Forks Ray's worker processes from one process, the zygote, which has imported what they need: 30 ms each instead of seconds.

    with launching(Zygote(folder, environment, modules)):   # while a private Ray starts: its raylet takes workers from the zygote
        ray.init(...)

Ray starts a Python worker as `sys.executable default_worker.py ...`. While the context lasts, `sys.executable` is a launcher that
hands such a command to the zygote: arguments, environment, folder and standard streams. Whatever else it is asked to run, and
whatever it is asked when there is no zygote, it runs with Python itself. Forks share the pages of what was imported.

The zygote has one thread when it forks: it never starts Ray, a process group or CUDA. It ends when its parent does. Linux only.
"""

from __future__ import annotations

import contextlib
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
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED = sys.platform == "linux"
ENTRY = "default_worker.py"
CONTEXT = "--serialized-runtime-env-context="
LIMIT = 1 << 20  # bytes of a request
BACKLOG = 256
END_S = 5.0
NO_JOB = "ffffffff"  # a worker that Ray starts before it is known for what
LAUNCHER = """#!/bin/sh
case "$1 $2 $3" in *{entry}*) exec {python} -I -S {client} {place} {python} "$@";; esac
exec {python} "$@"
"""


class Zygote:
    """Starts a zygote in a private folder; `launcher` is the executable that asks it. Ended by `end`, or with this process."""

    def __init__(self, folder: Path, environment: Mapping[str, str], modules: Sequence[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="z", dir=folder))
        place, client = self.folder / "socket", Path(__file__).with_name("zygote_client.py")
        self.launcher = self.folder / "python"
        quoted = {"python": sys.executable, "client": str(client), "place": str(place)}
        self.launcher.write_text(LAUNCHER.format(entry=ENTRY, **{k: shlex.quote(v) for k, v in quoted.items()}))
        self.launcher.chmod(0o700)
        command = [sys.executable, "-m", "heliostat.cluster.zygote", str(place), *modules]
        self.process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end(self) -> None:
        """Ends the zygote; the processes that it has forked live on."""
        self.process.kill()
        self.process.wait(END_S)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def launching(zygote: Zygote) -> Iterator[None]:
    """Makes a Ray that starts inside the context take its workers from the zygote."""
    python, sys.executable = sys.executable, str(zygote.launcher)
    try:
        yield
    finally:
        sys.executable = python


@dataclass
class Request:
    """Holds a command that a launcher was asked to run."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str


def main() -> None:
    """Imports the modules, then forks a process for every request until standard input ends."""
    place, *modules = sys.argv[1:]
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())  # Ray's workers end when it does: it ends with the raylet's own parent
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(place)  # in a folder that nobody else may enter
        listener.listen(BACKLOG)
        with _own_ids():
            for module in modules:
                with contextlib.suppress(ImportError):  # of an extra that is not installed
                    importlib.import_module(module)
        if threading.active_count() > 1:
            raise SystemExit(f"{modules} have started threads, which a fork would lose")
        if _next_id() == _next_id():
            raise SystemExit("Ray has drawn random numbers already: all forks would draw the same ones, and name things alike")
        gc.freeze()  # a collection writes to each object that it looks at, and so would copy all that the forks share
        request = _serve(listener)
    if request:
        _become(request)
    else:
        shutil.rmtree(Path(place).parent, ignore_errors=True)


@contextlib.contextmanager
def _own_ids() -> Iterator[None]:
    """Keeps Ray's random numbers unused inside: they would go on alike in all forks. Actor classes draw an id when defined."""
    import ray.actor

    kind: Any = ray.actor.ActorClassID

    class Drawn:
        @staticmethod
        def from_random() -> Any:
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
    os.waitpid(pid, 0)
    os.close(writable)
    with os.fdopen(readable, "rb") as drawn:
        return drawn.read()


def worker(request: Request) -> Request | None:
    """Reads Ray's command for a worker, with its runtime environment applied; None if no fork of this process can be that worker.

    That is one of another job, because Ray's library reads the job's id when it is imported, and one whose runtime environment
    asks for more than variables.
    """
    words, variables = list[str](), dict[str, str]()
    program = next(i for i, word in enumerate(request.arguments) if word.endswith(ENTRY))
    for word in request.arguments[program:]:
        if word.startswith(CONTEXT):
            context = json.loads(word.removeprefix(CONTEXT))
            variables = context.pop("env_vars", {})
            if any(value for name, value in context.items() if (name, value) != ("py_executable", sys.executable)):
                return None
        elif not word.startswith("--language="):
            words.append(word)
    environment = request.environment | variables
    if environment.get("RAY_JOB_ID", NO_JOB) not in (NO_JOB, os.environ.get("RAY_JOB_ID")):
        return None
    return Request(words, environment, request.folder)


def _serve(listener: socket.socket) -> Request | None:
    """Forks for each request; returns the request in the new process, and None in the zygote when its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps what was forked
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:
            return None
        connection, _ = listener.accept()
        with connection:
            request = _answer(connection)
        if request:
            return request


def _answer(connection: socket.socket) -> Request | None:
    """Takes a request and forks; returns the request in the new process."""
    connection.settimeout(END_S)
    try:
        asked, streams = receive(connection)
    except (OSError, ValueError, TypeError):  # whoever asked has gone, and Ray asks anew
        return None
    try:
        request = worker(asked)
        pid = os.fork() if request else None
    except (OSError, ValueError, StopIteration):  # no process or memory to be had, or no command of Ray's
        pid = None
    if pid is None:
        for stream in streams:
            os.close(stream)
        return None
    if not pid:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    if not pid:
        return request
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % pid)
    return None


def receive(connection: socket.socket) -> tuple[Request, list[int]]:
    """Receives a request and the three standard streams of whoever sent it."""
    data, streams, _, _ = socket.recv_fds(connection, LIMIT, 3)
    while not data.endswith(b"\n"):
        more = connection.recv(LIMIT)
        if not more or len(data) > LIMIT:
            for stream in streams:
                os.close(stream)
            raise ValueError("half a request")
        data += more
    return Request(**json.loads(data)), streams


def _become(request: Request) -> None:
    """Runs the request's program in this process, as if it had been started for it."""
    os.setsid()  # Ray ends a worker's process group with it
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
    for entry in reversed(request.environment.get("PYTHONPATH", "").split(os.pathsep)):
        if entry and entry not in sys.path:
            sys.path.insert(1, entry)
    sys.argv = request.arguments
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
