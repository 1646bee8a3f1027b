"""Joins, aborts, and leaves the process group of an attempt. The worker's process continues after the attempt.

An aborted NCCL collective returns without an error, although the buffers have wrong values. So `obey` first records the driver's
order to abort, and then aborts the group. After an order, `check` raises an error. If `check` raises no error, all numbers that
reached the host before are valid.
"""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from heliostat.data import device_threads
from heliostat.errors import PeerLostError

TIMEOUT = timedelta(minutes=30)  # per collective; the driver's watchdog reacts sooner
# NCCL's watchdog would end a process that has lost a peer, and its monitor a process whose watchdog is stuck: both are off
HELD_BACK = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}

DEVICES = Path("/sys/bus/pci/devices")

_taking_apart = threading.Lock()
_order = threading.Event()  # set when the driver orders this attempt's workers to abort


@dataclass(frozen=True)
class WorkerPlace:
    """Describes a worker's position in an attempt: its ranks, the rendezvous, and the GPUs that the workers on its node share."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    rendezvous: str  # file://... or tcp://HOST:PORT
    backend: str
    gpus: tuple[str, ...] = ()


def join(place: WorkerPlace) -> None:
    """Joins the process group of an attempt. First sets environment variables. With GPUs, also sets the device and the CPU
    cores."""
    global _order
    import torch
    import torch.distributed as dist

    _order = threading.Event()
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_WORLD_SIZE": str(place.local_world),
    }
    if place.rendezvous.startswith("tcp://"):
        host, _, port = place.rendezvous.removeprefix("tcp://").rpartition(":")
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    for name, value in HELD_BACK.items():
        os.environ.setdefault(name, value)
    if place.gpus:  # all GPUs of the node, so that NCCL reaches the others' memory; set before CUDA starts
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
        device_threads.use(place.local_rank)
        gpu: Any = torch.cuda.get_device_properties(place.local_rank)  # Any: the type stub lacks the PCI ids
        bind_near(gpu.pci_domain_id, gpu.pci_bus_id, gpu.pci_device_id)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # connect only to peers that exchange data
    dist.init_process_group(place.backend, init_method=place.rendezvous, rank=place.rank, world_size=place.world, timeout=TIMEOUT)


def leave() -> None:
    """Leaves the process group, and removes the group and its engine from this process."""
    import torch
    import torch.distributed as dist

    from heliostat.engine import deepspeed_engine

    deepspeed_engine.destroy_engines()
    with _taking_apart:
        if dist.is_initialized():
            dist.destroy_process_group()
    deepspeed_engine.forget_groups()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()  # raises if this process can no longer use its device


def reforms() -> bool:
    """Checks whether this process can form another NCCL group after an abort.

    The process can't form another group if NCCL's watchdog ends the process first.
    """
    return all(os.environ.get(name, value) == value for name, value in HELD_BACK.items())


def order() -> threading.Event:
    """Returns the event that is set when the driver orders the current attempt to abort. Pass this event to `obey`."""
    return _order


def ordered() -> bool:
    """Checks whether the driver has ordered the workers of this attempt to abort."""
    return _order.is_set()


def check() -> None:
    """Raises PeerLostError if the driver has ordered the workers to abort, because this worker's results after the order may be
    wrong."""
    if ordered():
        raise PeerLostError("this worker aborted because another worker failed")


def obey(abort: threading.Event) -> None:
    """Carries out the driver's order to abort, from any thread. An order for an earlier attempt has no effect."""
    abort.set()  # first, so that no aborted collective counts as complete
    _abort(abort)


def abort() -> None:
    """Aborts NCCL's part of all process groups, from any thread. A worker that waits in a collective for a dead peer then
    returns.

    Gloo needs no abort: it fails when the connection fails.
    """
    _abort(_order)


def _abort(abort: threading.Event) -> None:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    with _taking_apart:
        if abort is _order and dist.is_initialized() and dist.get_backend() == "nccl":
            distributed_c10d._abort_process_group()


def bind_near(domain: int, bus: int, device: int, devices: Path = DEVICES) -> set[int]:
    """Binds this thread, and all threads that it starts later, to the CPU cores near a GPU (Linux only).

    Returns these cores. Returns an empty set if these cores aren't known, or if this process isn't allowed to use any of them.

    Without this binding, on machines with two processors, kernel launches and copies between host and device cross the link
    between the processors. Earlier limits of the worker's cores stay in force.
    """
    cores = near(domain, bus, device, devices) & _allowed() if hasattr(os, "sched_setaffinity") else set()
    if cores:
        os.sched_setaffinity(0, cores)
    return cores


def near(domain: int, bus: int, device: int, devices: Path = DEVICES) -> set[int]:
    """Reads the CPU cores near a GPU on the PCI bus, from Linux's list (`0-3,8-11`). Returns an empty set if Linux has no
    list."""
    place = f"{domain:04x}:{bus:02x}:{device:02x}.0"  # Linux's name for its folder
    try:
        ranges = (devices / place / "local_cpulist").read_text()
    except OSError:
        return set()
    spans = [[int(n) for n in part.split("-")] for part in ranges.strip().split(",") if part]
    return {core for span in spans for core in range(span[0], span[-1] + 1)}


@functools.cache
def _allowed() -> frozenset[int]:
    """Returns the cores that this process could use before it was first bound."""
    return frozenset(os.sched_getaffinity(0))
