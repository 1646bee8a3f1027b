"""Forks Ray's worker processes from one process, the zygote, which has imported what they need: 30 ms each instead of seconds.

    zygote = Zygote(folder, environment, modules)
    with launching(zygote.launcher):   # while a Ray node starts: its raylet takes workers from the zygote
        ray.init(...)

Ray starts a Python worker as `sys.executable default_worker.py ...`. While the context lasts, `sys.executable` is a launcher that
hands such a command to the zygote: arguments, environment, folder and standard streams. Whatever else it is asked to run, and
whatever it is asked when there is no zygote, it runs with Python itself; a `quiet` launcher, `quiet_agent` in the place of the
dashboard's agent. Forks share the pages of what was imported.

The zygote's own process is `zygote_server`. It ends when its parent does. Linux only.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SUPPORTED = sys.platform == "linux"
PLACE = "HELIOSTAT_ZYGOTE"  # the variable that names the folder of a node's zygote
ENTRY, AGENT = "default_worker.py", "quiet_agent.py"
END_S = 5.0
LAUNCHER = """#!/bin/sh
case "$1 $2 $3" in *{entry}*) exec {python} -I -S {client} {place} {python} "$@";; {quiet}esac
exec {python} "$@"
"""
QUIET = '*/dashboard/agent.py*) exec {python} -I -S {agent} "$@";; '


class Zygote:
    """Starts a zygote in a folder of its own, which it makes private; ended by `end`, or with this process.

    `early` are the modules that do not import Ray. With RAY_JOB_ID in the environment its forks are workers of that job alone;
    without it, of any job: for each it keeps a fork of its own, which imports the rest. It then begins with the first request,
    when it is woken, or, without `drivers`, after two minutes. With `drivers`, which import Ray, it has a fork for commands of
    heliostat's too (`forked_command`). `quiet`: for a Ray that has no dashboard.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        modules: Sequence[str],
        early: Sequence[str] = (),
        drivers: Sequence[str] = (),
        quiet: bool = False,
    ) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "socket").unlink(missing_ok=True)  # of one that was killed
        place, client = folder / "socket", Path(__file__).with_name("zygote_client.py")
        self.launcher = launcher(folder)
        words = {"python": sys.executable, "client": str(client), "place": str(place), "agent": str(client.with_name(AGENT))}
        quoted = {name: shlex.quote(word) for name, word in words.items()}
        self.launcher.write_text(LAUNCHER.format(entry=ENTRY, quiet=QUIET.format(**quoted) if quiet else "", **quoted))
        self.launcher.chmod(0o700)
        imported = [",".join(one) for one in (early, modules, drivers)]
        command = [sys.executable, "-m", "heliostat.cluster.zygote_server", str(place), *imported]
        self.process = self._launch(command, dict(environment))

    def _launch(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Starts the zygote's own process, which leads a session, and ends when its standard input does."""
        nowhere = subprocess.DEVNULL
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
        )

    def end(self) -> None:
        """Ends the zygote, and the workers of the job that its environment names; those of other jobs live on."""
        self.process.kill()
        self.process.wait(END_S)
        shutil.rmtree(self.folder, ignore_errors=True)


def wake(folder: Path) -> None:
    """Makes the zygote of this folder begin with its imports, if there is one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(folder / "socket"))


def launcher(folder: Path) -> Path:
    """Returns the executable that asks the zygote of this folder."""
    return folder / "python"


@contextlib.contextmanager
def launching(executable: Path) -> Iterator[None]:
    """Makes a Ray node that starts inside the context take its workers from the launcher's zygote."""
    python, sys.executable = sys.executable, str(executable)
    try:
        yield
    finally:
        sys.executable = python
