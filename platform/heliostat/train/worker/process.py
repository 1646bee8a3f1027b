"""Runs a run's attempts in a process that outlives them: a Ray actor of the driver's pool (`train.driver.pool`).

Between two attempts a process leaves its process group, and DeepSpeed's state of it: one that has survived and one that is new
must agree on all that DeepSpeed counts.
"""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray

from heliostat.errors import WorkerError
from heliostat.train.worker import sigterm

TIMEOUT = timedelta(minutes=30)  # of a collective; the watchdog of the driver is quicker


@dataclass(frozen=True)
class Place:
    """Holds a worker's place in an attempt: its ranks, the rendezvous, and the GPUs that the workers on its node share."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    rendezvous: str  # file://... or tcp://HOST:PORT
    backend: str
    gpus: tuple[str, ...] = ()


class TrainWorker:
    def __init__(self) -> None:
        self._spent = False
        sigterm.heed_sigterm()

    def facts(self) -> dict[str, Any]:
        """Returns this process's id, its node's id and address, its GPUs' ids, and whether it is not to be used again."""
        context = ray.get_runtime_context()
        return {
            "pid": os.getpid(),
            "node": context.get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "gpus": [str(gpu) for gpu in ray.get_gpu_ids()],
            "spent": self._spent or sigterm.received.is_set(),
        }

    def free_port(self) -> int:
        """Finds a TCP port of this node that nothing listens on."""
        with socket.socket() as found:
            found.bind((ray.util.get_node_ip_address(), 0))
            return found.getsockname()[1]

    def run(self, place: Place, config: dict[str, Any]) -> dict[str, Any]:
        """Runs one attempt's worker and returns its summary; whatever the attempt has left is gone when this ends."""
        from heliostat.train.worker.loop import Worker

        join(place)
        worker = None
        try:
            worker = Worker(config)
            return worker.run()
        except BaseException as e:
            _release(e)
            if not _arrives(e):
                raise WorkerError(f"the workers failed: {type(e).__name__}: {e}") from None
            raise
        finally:
            self._spent |= worker is not None and worker.saver.busy  # it would write into the next attempt's checkpoint
            del worker
            leave()


def join(place: Place) -> None:
    """Joins the process group of an attempt."""
    import torch
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_WORLD_SIZE": str(place.local_world),
    }
    if place.rendezvous.startswith("tcp://"):
        host, _, port = place.rendezvous.removeprefix("tcp://").rpartition(":")
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    if place.gpus:  # all of the node's, so that NCCL reaches the others' memory; before CUDA starts
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
        torch.cuda.set_device(place.local_rank)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # connect to those who are talked to, not to all
    dist.init_process_group(place.backend, init_method=place.rendezvous, rank=place.rank, world_size=place.world, timeout=TIMEOUT)


def leave() -> None:
    """Leaves the process group, and whatever of it and of its engine is in this process."""
    import torch.distributed as dist

    from heliostat.train.worker import deepspeed_engine

    deepspeed_engine.destroy_engines()
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed_engine.forget_groups()


def _arrives(error: BaseException) -> bool:
    """Tells whether the error would reach the driver as it is: a class that does not take its own `args` would not."""
    if isinstance(error, ray.exceptions.RayError):  # of the stream's, whose cause the driver reads
        return True
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (of this process itself)
    except Exception:  # noqa: BLE001 (whatever such a class does)
        return False
    return True


def _release(error: BaseException | None) -> None:
    """Lets go of what the frames of an error and its causes hold, such as the engine; their lines stay readable."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
