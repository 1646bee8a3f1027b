"""Creates hosts on this machine: network namespaces on a bridge. Needs root and iproute2."""

from __future__ import annotations

import os
import subprocess


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def why_not() -> str:
    """Returns the reason why hosts can't be created here; empty if they can."""
    probe = f"hp{os.getpid() % 10**6}"  # of test processes on the same machine
    try:
        ip("netns", "add", probe)
        ip("netns", "del", probe)
        ip("link", "add", probe, "type", "bridge")
        ip("link", "del", probe)
    except FileNotFoundError:
        return "needs iproute2"
    except subprocess.CalledProcessError as e:
        return f"network namespaces are not allowed here ({e.stderr.strip()})"
    return ""


class Network:
    """Creates a network: `with Network("10.78.0", "hel", 3) as net:`. Hosts 1 to 3 have the addresses 10.78.0.1 to .3, and this
    machine has .254."""

    def __init__(self, subnet: str, prefix: str, count: int) -> None:
        self.subnet, self.prefix, self.bridge, self.numbers = subnet, prefix, f"br{prefix}", range(1, count + 1)
        self.gateway = self.address(254)

    def address(self, number: int) -> str:
        return f"{self.subnet}.{number}"

    def inside(self, number: int) -> list[str]:
        """Returns the words that run a command on a host."""
        return ["ip", "netns", "exec", f"{self.prefix}{number}"]

    def cut_off(self, number: int) -> None:
        ip("-n", f"{self.prefix}{number}", "link", "set", "eth0", "down")

    def __enter__(self) -> Network:
        self._remove()
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.gateway}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for number in self.numbers:
            name = f"{self.prefix}{number}"
            ip("netns", "add", name)
            ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"v{name}", "master", self.bridge, "up")
            ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "route", "add", "default", "via", self.gateway)  # Ray takes the address that leads out as its own
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for number in self.numbers:
            ip("netns", "del", f"{self.prefix}{number}", check=False)
        ip("link", "del", self.bridge, check=False)
