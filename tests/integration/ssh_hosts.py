"""Hosts of our own on one machine: network namespaces on a bridge, each with its own processes, /root, /tmp/ray and /dev/shm, and
an sshd. Needs root, iproute2, util-linux and openssh-server; `missing()` says what is not there.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

BRIDGE, PREFIX = "brheliostat", "hel"
PROBE = f"helprobe{os.getpid()}"  # of test processes beside each other
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
    """What keeps hosts from being made here; nothing if they can."""
    if os.geteuid():
        return "network namespaces need root"
    tools = [t for t in ("ip", "unshare", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd") if not shutil.which(t)]
    if tools:
        return f"not on this machine: {', '.join(tools)} (Debian: iproute2, util-linux, openssh-server, openssh-client, rsync)"
    done = subprocess.run(["ip", "netns", "add", PROBE], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", PROBE], capture_output=True, check=False)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else ""


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


class Hosts:
    """`addresses` 1 to `count`; `key` logs into all of them as root."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.addresses = [f"{SUBNET}.{i}" for i in range(1, count + 1)]
        self.key = folder / "key"
        self._sshd: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Hosts:
        self._remove()
        for name in ("key", "host-key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True)
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{MASTER}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for number, address in enumerate(self.addresses, 1):
            self._host(number, address)
        for address in self.addresses:
            _until_open(address, 22)
        return self

    def _host(self, number: int, address: str) -> None:
        name, home = f"{PREFIX}{number}", self.folder / f"home{number}"
        (home / ".ssh").mkdir(parents=True)
        shutil.copy(self.folder / "key.pub", home / ".ssh" / "authorized_keys")
        _ip("netns", "add", name)
        _ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"v{name}", "master", BRIDGE, "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "route", "add", "default", "via", MASTER)  # Ray takes the address that leads out as its own
        script = START.format(home=home, key=self.folder / "host-key", address=address)
        command = ["ip", "netns", "exec", name, "unshare", "-m", "-p", "-f", "-u", "-i", "--mount-proc", "--kill-child"]
        with (self.folder / f"sshd{number}.log").open("wb") as log:
            self._sshd[address] = subprocess.Popen(
                [*command, "bash", "-c", script], stdout=log, stderr=log, start_new_session=True
            )

    def run(self, address: str, command: str) -> str:
        options = [
            "-i",
            str(self.key),
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
        ]
        done = subprocess.run(
            ["ssh", *options, f"root@{address}", command], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def lose(self, address: str) -> None:
        """The host is off at once: all of its processes are killed."""
        self._sshd[address].send_signal(signal.SIGKILL)
        self._sshd[address].wait(20)

    def __exit__(self, *error: object) -> None:
        for process in self._sshd.values():
            process.kill()
            process.wait(20)
        self._remove()

    def _remove(self) -> None:
        for number in range(1, self.count + 1):
            _ip("netns", "del", f"{PREFIX}{number}", check=False)
        _ip("link", "del", BRIDGE, check=False)


def _until_open(address: str, port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection((address, port), timeout=2).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"{address}:{port} does not open"
            time.sleep(0.1)
