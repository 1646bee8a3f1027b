"""Runs a command of heliostat's as a fork of a cluster's zygote, which has imported what it needs.

    child = begin(folder, ["-m", "heliostat", "train", "job.json"], output)    # None where no zygote answers
    child.poll()                                    # as of `subprocess.Popen`, whose place it takes

The fork is no child of this process: it is killed when this process ends, but gets no signal that is sent to this one's family.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

from heliostat.cluster.zygote_client import send

START_S = 60.0  # for imports, where the zygote was not asked before


class ForkedCommand:
    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection, self.pid = connection, pid
        self.returncode: int | None = None
        connection.setblocking(False)

    def poll(self) -> int | None:
        """Returns the exit code, -N of one that signal N has ended; None while the command runs."""
        if self.returncode is None:
            try:
                told = self._connection.recv(32)
            except BlockingIOError:
                return None
            except OSError:
                told = b""
            self.returncode = int(told) if told else -signal.SIGKILL  # who should have told it was killed
            self._connection.close()
        return self.returncode


def begin(folder: Path, arguments: list[str], output: int) -> ForkedCommand | None:
    """Starts `python ARGUMENTS` in this process's folder and environment; both its outputs go to a descriptor."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        connection.settimeout(START_S)
        connection.connect(str(folder / "socket"))
        send(connection, arguments, [nothing, output, output])
        if told := connection.recv(32):
            return ForkedCommand(connection, int(told))
    except OSError:
        pass
    finally:
        os.close(nothing)
    connection.close()
    return None
