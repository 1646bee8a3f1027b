"""Gives a command a fork server with all imports of workers, forked from its process before the command does anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from heliostat.cluster.fork_server import server, start


class Forked:
    """Provides a fork server's process with the used part of subprocess.Popen's interface. Its standard input ends with this
    process."""

    def __init__(self, pid: int, stdin: int) -> None:
        self.pid, self.stdin = pid, os.fdopen(stdin, "wb")
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, "the fork server does not end"
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def wait() -> None:
    """Forks a process that becomes the fork server when this process starts one, and otherwise ends with this process."""
    if Path("/dev/nvidiactl").exists():  # then workers import on their own, as DeepSpeed asks for the devices
        return
    ours, theirs = socket.socketpair()
    if not (pid := os.fork()):
        ours.close()
        _become(theirs)
    theirs.close()

    def launch(self: Any, command: list[str], environment: dict[str, str]) -> Forked:
        readable, writable = os.pipe()
        asked = {"arguments": command[2:], "environment": environment, "folder": str(Path.cwd())}
        socket.send_fds(ours, [json.dumps(asked).encode() + b"\n"], [readable])
        os.close(readable)
        return Forked(pid, writable)

    start.ForkServer._launch = launch  # type: ignore[assignment, method-assign]


def _become(channel: socket.socket) -> None:
    """Waits for the request, and runs the server. This process and those that it forks end here."""
    try:
        request, (stdin,) = server.receive(channel, 1)
    except ValueError:  # whoever could ask has ended
        os._exit(0)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number, stream in enumerate((stdin, nowhere, nowhere)):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    sys.argv = request.arguments
    sys.stdin = os.fdopen(0, closefd=False)
    server.main()
    sys.exit(0)
