"""Starts the fork server of a private Ray, and makes Ray get its workers from the server.

Ray starts a Python worker as `sys.executable default_worker.py ...`. While a private Ray starts, `sys.executable` is a launcher.
The launcher passes this command to the server, with arguments, environment, folder, and standard streams. If no server answers,
the launcher runs the command with Python. The launcher also runs all other commands with Python. Instead of the dashboard's
agent, the launcher runs `quiet_agent`.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

log = logging.getLogger(__name__)

SWITCH = "HELIOSTAT_FORK_SERVER"
TESTED = ("2.60",)  # supported versions of Ray
ENTRY = "default_worker.py"
END_S = 5.0
LAUNCHER = """#!/bin/sh
case "$1 $2 $3" in
*{entry}*) exec {python} -I -S {launcher} {socket} {python} "$@";;
*/dashboard/agent.py*) exec {python} -I -S {agent} "$@";;
esac
exec {python} "$@"
"""


@functools.cache
def supported() -> bool:
    """Checks whether this machine can fork workers. Logs a warning if only Ray's version prevents forking."""
    if sys.platform != "linux" or os.environ.get(SWITCH) == "0":
        return False
    version = metadata.version("ray")
    if version.rpartition(".")[0] not in TESTED:
        log.warning(
            (
                "Ray %s starts each worker without the fork server, which takes some seconds, because the fork server was tested "
                "only with %s"
            ),
            version,
            TESTED[-1],
        )
        return False
    return True


class ForkServer:
    """Starts a fork server in a folder that only this user may enter. The server ends when `end` is called, or when this process
    ends.

    `environment`: must contain RAY_JOB_ID, because the forks are workers of that job only.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], modules: Sequence[str]) -> None:
        self.folder, self.launcher = folder, folder / "python"
        folder.mkdir(mode=0o700, exist_ok=True)
        here = Path(__file__).parent
        paths = {"python": sys.executable, "socket": folder / "socket", "launcher": here / "launcher.py",
                 "agent": here / "quiet_agent.py"}  # fmt: skip
        self.launcher.write_text(LAUNCHER.format(entry=ENTRY, **{name: shlex.quote(str(path)) for name, path in paths.items()}))
        self.launcher.chmod(0o700)
        command = [sys.executable, "-m", "heliostat.cluster.fork_server.server", str(folder / "socket"), ",".join(modules)]
        self.process = self._launch(command, dict(environment))

    def _launch(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Starts the server's process in a new session. The process ends when the process's standard input ends."""
        nowhere = subprocess.DEVNULL
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
        )

    def end(self) -> None:
        """Ends the server and its workers."""
        self.process.kill()
        self.process.wait(END_S)
        shutil.rmtree(self.folder, ignore_errors=True)
