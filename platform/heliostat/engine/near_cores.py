"""Keeps a worker on the cores that are near its GPU, so that its memory is there, too (Linux; elsewhere nothing happens).

Copies between host and device, and kernels that are launched, otherwise cross the processors' link on machines with two of them.
What the worker was confined to before it stays so: by a container, or by whoever started it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

DEVICES = Path("/sys/bus/pci/devices")


def bind(gpu: Any, devices: Path = DEVICES) -> set[int]:
    """Binds this thread, and those that it starts from now on, to the cores near a GPU, given as torch's properties; returns
    them, none if they are not known or none of them may be used."""
    cores = near(address(gpu), devices) & _allowed() if hasattr(os, "sched_setaffinity") else set()
    if cores:
        os.sched_setaffinity(0, cores)
    return cores


def address(gpu: Any) -> str:
    """Returns a GPU's address on the PCI bus, as Linux names its folder."""
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"


def near(place: str, devices: Path = DEVICES) -> set[int]:
    """Reads which cores are near a device; none if the system does not tell."""
    try:
        return parse((devices / place / "local_cpulist").read_text())
    except OSError:
        return set()


def parse(ranges: str) -> set[int]:
    """Parses cores as Linux lists them: `0-3,8-11`."""
    spans = [[int(n) for n in part.split("-")] for part in ranges.strip().split(",") if part]
    return {core for span in spans for core in range(span[0], span[-1] + 1)}


@functools.cache
def _allowed() -> frozenset[int]:
    """Returns the cores that this process had before it was bound the first time."""
    return frozenset(os.sched_getaffinity(0))
