"""Joins, aborts and leaves the process group of an attempt, in a process that outlives it.

An aborted collective of NCCL returns buffers that nothing was written into, without an error. So the order to abort is noted
before the group is aborted, and `check` raises from then on. Numbers that were on the host before `check` returned are sound.
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

TIMEOUT = timedelta(minutes=30)  # of a collective; the watchdog of the driver is quicker
# NCCL's own watchdog would end the process that has lost a peer, and a second one the process whose watchdog is stuck
HELD_BACK = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}

DEVICES = Path("/sys/bus/pci/devices")

_taking_apart = threading.Lock()
_order = threading.Event()  # the driver has ordered this attempt's workers to abort


@dataclass(frozen=True)
class WorkerPlace:
    """Holds a worker's place in an attempt: its ranks, the rendezvous, and the GPUs that the workers on its node share."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    rendezvous: str  # file://... or tcp://HOST:PORT
    backend: str
    gpus: tuple[str, ...] = ()


def join(place: WorkerPlace) -> None:
    """Joins the process group of an attempt."""
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
    if place.gpus:  # all of the node's, so that NCCL reaches the others' memory; before CUDA starts
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
        device_threads.use(place.local_rank)
        gpu: Any = torch.cuda.get_device_properties(place.local_rank)  # whose stub lacks the place on the bus
        bind_near(gpu.pci_domain_id, gpu.pci_bus_id, gpu.pci_device_id)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # connect to those who are talked to, not to all
    dist.init_process_group(place.backend, init_method=place.rendezvous, rank=place.rank, world_size=place.world, timeout=TIMEOUT)


def leave() -> None:
    """Leaves the process group, and whatever of it and of its engine is in this process."""
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
        torch.cuda.synchronize()  # raises if this process can't use its device any more


def reforms() -> bool:
    """Tells whether this process can form another group of NCCL's behind an abort: not if its watchdog would end it first."""
    return all(os.environ.get(name, value) == value for name, value in HELD_BACK.items())


def order() -> threading.Event:
    """Returns the order to abort of the present attempt, for `obey`."""
    return _order


def ordered() -> bool:
    """Reports whether the driver has ordered the workers of this attempt to abort."""
    return _order.is_set()


def check() -> None:
    """Raises PeerLostError once the workers were ordered to abort: what this worker has computed meanwhile may be wrong."""
    if ordered():
        raise PeerLostError("this worker aborted because another worker failed")


def obey(abort: threading.Event) -> None:
    """Carries out the driver's order to abort, from any thread. An order that was given to an earlier attempt does nothing."""
    abort.set()  # first: a collective that this aborts must not be taken for a complete one
    _abort(abort)


def abort() -> None:
    """Aborts NCCL's part of all process groups, from any thread: a worker that waits in a collective for a dead one returns.

    Gloo needs no abort: it fails when the connection does.
    """
    _abort(_order)


def _abort(abort: threading.Event) -> None:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    with _taking_apart:
        if abort is _order and dist.is_initialized() and dist.get_backend() == "nccl":
            distributed_c10d._abort_process_group()


def bind_near(domain: int, bus: int, device: int, devices: Path = DEVICES) -> set[int]:
    """Binds this thread, and those that it starts from now on, to the cores near a GPU (on Linux alone); returns them, none if
    they are not known or none of them may be used.

    Copies between host and device, and kernels that are launched, otherwise cross the processors' link on machines with two of
    them. What the worker was confined to before it stays so.
    """
    cores = near(domain, bus, device, devices) & _allowed() if hasattr(os, "sched_setaffinity") else set()
    if cores:
        os.sched_setaffinity(0, cores)
    return cores


def near(domain: int, bus: int, device: int, devices: Path = DEVICES) -> set[int]:
    """Reads which cores are near a GPU on the PCI bus, as Linux lists them (`0-3,8-11`); none if it does not."""
    place = f"{domain:04x}:{bus:02x}:{device:02x}.0"  # as Linux names its folder
    try:
        ranges = (devices / place / "local_cpulist").read_text()
    except OSError:
        return set()
    spans = [[int(n) for n in part.split("-")] for part in ranges.strip().split(",") if part]
    return {core for span in spans for core in range(span[0], span[-1] + 1)}


@functools.cache
def _allowed() -> frozenset[int]:
    """Returns the cores that this process had before it was bound the first time."""
    return frozenset(os.sched_getaffinity(0))
