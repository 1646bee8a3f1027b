"""Simulates hosts, each with its own processes, /root, /tmp/ray, /dev/shm, and an sshd.

Needs root, iproute2, util-linux, and openssh-server; `missing()` returns what this machine lacks.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tests.integration.network import Network, why_not
from tests.waiting import until

SUBNET = "10.78.0"
MASTER = f"{SUBNET}.254"  # this machine, as the hosts see it
START = """
set -e
mkdir -p {home}/.ssh {home}/.pyenv /tmp/ray /run/sshd
if [ -d /root/.pyenv ]; then mount --rbind /root/.pyenv {home}/.pyenv; fi
mount --rbind {home} /root
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs -o size=1g tmpfs /dev/shm
chmod 700 /root /root/.ssh
exec /usr/sbin/sshd -D -e -f /dev/null -h {key} -o ListenAddress={address} -o UsePAM=no -o StrictModes=no -o PidFile=none \
  -o PermitRootLogin=prohibit-password -o AuthorizedKeysFile=/root/.ssh/authorized_keys -o AcceptEnv=none -o MaxStartups=100
"""


def missing() -> str:
    """Returns the reason why hosts can't be created here; empty if they can."""
    if os.geteuid():
        return "network namespaces need root"
    tools = [t for t in ("ip", "unshare", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd") if not shutil.which(t)]
    if tools:
        return f"not on this machine: {', '.join(tools)} (Debian: iproute2, util-linux, openssh-server, openssh-client, rsync)"
    return why_not()


class Hosts(Network):
    """Creates the hosts: `addresses` 1 to `count`. `key` logs into all of them as root."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(SUBNET, "hel", count)
        self.folder, self.key = folder, folder / "key"
        self.addresses = [self.address(number) for number in self.numbers]
        self._sshd: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Hosts:
        for name in ("key", "host-key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True)
        super().__enter__()
        for number, address in zip(self.numbers, self.addresses, strict=True):
            self._serve(number, address)
        for address in self.addresses:
            until(lambda at=address: _opens(at), f"sshd on {address}", 20)
        return self

    def _serve(self, number: int, address: str) -> None:
        home = self.folder / f"home{number}"
        (home / ".ssh").mkdir(parents=True)
        shutil.copy(self.folder / "key.pub", home / ".ssh" / "authorized_keys")
        script = START.format(home=home, key=self.folder / "host-key", address=address)
        command = [
            *self.inside(number),
            "unshare",
            "-m",
            "-p",
            "-f",
            "-u",
            "-i",
            "--mount-proc",
            "--kill-child",
            "bash",
            "-c",
            script,
        ]
        with (self.folder / f"sshd{number}.log").open("wb") as log:
            self._sshd[address] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def run(self, address: str, command: str) -> str:
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
        words = ["ssh", "-i", str(self.key), *(word for one in options for word in ("-o", one)), f"root@{address}", command]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout

    def lose(self, address: str) -> None:
        """Turns the host off at once: all of its processes are killed."""
        self._sshd[address].send_signal(signal.SIGKILL)
        self._sshd[address].wait(20)

    def __exit__(self, *error: object) -> None:
        for process in self._sshd.values():
            process.kill()
            process.wait(20)
        super().__exit__(*error)


def _opens(address: str) -> bool:
    try:
        socket.create_connection((address, 22), timeout=2).close()
    except OSError:
        return False
    return True
