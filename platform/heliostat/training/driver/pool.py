"""Keeps the processes of a run's workers between attempts. Each process is a Ray actor in its own slot (`training.driver.slots`).

    with WorkerPool(job.workers) as pool:
        members = pool.take(3)      # three new processes
        ...
        pool.drop(member)           # it has died, or must not be used again
        members = pool.take(3)      # the two survivors, and a new process in place of the dead one
        members = pool.take(2)      # two of them; the pool releases the resources of the third

The pool reserves resources for exactly as many workers as the last `take` asked for. It releases the resources on nodes that have
left or are about to leave. The other processes stay.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from heliostat.cluster import ray_internals
from heliostat.cluster.connect import remote_environment
from heliostat.config.spec import Workers
from heliostat.engine.process_group import WorkerPlace
from heliostat.errors import PlacementError, TrainingError
from heliostat.text import brief
from heliostat.training.driver.slots import Slots
from heliostat.training.worker.process import TrainWorker, WorkerFacts

log = logging.getLogger(__name__)

START_S = 120.0  # seconds for the processes to start and answer
ANSWER_S = 10.0  # seconds for a running process to answer
PORT_S = 30.0  # seconds for a process to find a free port
POLL_S = 0.05


@dataclass(frozen=True)
class Member:
    """Describes a worker's process: its actor, and the facts that it reports about itself."""

    slot: int  # the number of its slot
    actor: ActorHandle[TrainWorker]
    pid: int
    node: str
    address: str
    gpus: tuple[str, ...]


class WorkerPool:
    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.waited_s = 0.0  # seconds that the last `take` waited for resources
        self._closed = threading.Event()
        self._slots = Slots(workers, self._closed)
        self._members: dict[int, Member] = {}
        self._seen: dict[Member, tuple[str, ...]] = {}  # the GPUs that each process was set up to see

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> bool:
        """Returns whether a `take` is waiting for resources."""
        return self._slots.waiting.is_set()

    def held(self) -> Counter[str]:
        """Counts the workers for which the pool holds resources, by node. Skips nodes that have left or are about to leave."""
        return Counter(slot.node for slot in self._slots.staying())

    def avoid(self, out: Iterable[str], for_good: bool = False) -> None:
        """Treats nodes as lost for some time, before Ray knows that the nodes are lost.

        `for_good`: excludes the nodes permanently, although they are still running.
        """
        self._slots.avoid(out, for_good)

    def avoided(self) -> set[str]:
        return self._slots.avoided()

    def trim(self, count: int) -> list[Member]:
        """Releases slots beyond `count`, and slots on nodes that have left or are about to leave. Returns the processes that
        stay."""
        staying = {slot.number for slot in self._slots.staying()}
        self._give_back(self._slots.held.keys() - staying)
        self._check()
        self._give_back(self._slots.surplus(count, self._members))
        return list(self._members.values())

    def take(self, count: int, patient: bool = True) -> list[Member]:
        """Returns `count` live processes, ordered by node and GPU. Raises TrainingError if the processes don't start.

        Waits for the resources of the processes. If not `patient`, raises PlacementError after 30 s, because there may be room
        for fewer workers.
        """
        try:
            self.trim(count)
            began = time.monotonic()
            try:
                self._slots.fill(count, patient)
            finally:
                self.waited_s = time.monotonic() - began
                self._end(self._members.keys() - self._slots.held.keys())  # their resources were released
            self._members |= self._start([slot for slot in self._slots.held if slot not in self._members])
            self._go_on()
        except BaseException:
            if self._closed.is_set():
                self._give_all_back()
            raise
        return sorted(self._members.values(), key=lambda m: (m.address, m.node, [gpu.zfill(4) for gpu in m.gpus], m.slot))

    def sees(self, member: Member, gpus: tuple[str, ...]) -> bool:
        """Records the GPUs that a process will see.

        Returns whether the process can see these GPUs. Once a process has initialized CUDA, it can see only the GPUs that it saw
        before.
        """
        return self._seen.setdefault(member, gpus) == gpus

    def drop(self, member: Member) -> None:
        """Ends a process, if the process is alive. The pool keeps the process's resources."""
        if self._members.get(member.slot) is member:
            del self._members[member.slot]
        self._seen.pop(member, None)
        ray.kill(member.actor)

    def close(self) -> None:
        """Ends all processes, releases their resources, and ends a `take` that waits in another thread."""
        self._closed.set()
        self._give_all_back()

    def reopen(self) -> None:
        """Makes a closed pool usable again. Call this method once no other thread waits in the pool."""
        self._closed.clear()

    def _go_on(self) -> None:
        if self._closed.is_set():
            raise PlacementError("the run no longer needs the workers")

    def _give_back(self, slots: Iterable[int]) -> None:
        slots = list(slots)
        self._end(slots)
        self._slots.give_back(slots)

    def _end(self, slots: Iterable[int]) -> None:
        for member in [self._members[slot] for slot in slots if slot in self._members]:
            self.drop(member)

    def _give_all_back(self) -> None:
        self._end(list(self._members))
        self._slots.give_all_back()

    # processes -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Drops the processes that don't answer, or must not be used again."""
        calls: dict[Member, ray.ObjectRef[WorkerFacts]] = {m: m.actor.facts.remote() for m in self._members.values()}
        until = time.monotonic() + ANSWER_S
        for member, call in calls.items():
            try:
                spent = ray.get(call, timeout=max(0.0, until - time.monotonic()))["spent"]
            except ray.exceptions.RayError as e:
                log.debug("a worker's process can't be reused: %s", e)
                spent = True
            if spent:
                self.drop(member)

    def _start(self, slots: list[int]) -> dict[int, Member]:
        workers, actor = self.workers, ray.remote(TrainWorker)
        actors = {
            slot: cast(
                "ActorHandle[TrainWorker]",
                actor.options(
                    num_cpus=workers.cpus,
                    num_gpus=workers.gpus or None,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._slots.held[slot].group, 0),
                    runtime_env=remote_environment(workers.gpus) or None,
                ).remote(),
            )
            for slot in slots
        }
        try:
            facts = self._answers({slot: one.facts.remote() for slot, one in actors.items()})
        except BaseException:
            for one in actors.values():
                ray.kill(one)
            raise
        return {
            slot: Member(slot, actors[slot], f["pid"], f["node"], f["address"], tuple(f["gpus"])) for slot, f in facts.items()
        }

    def _answers(self, calls: dict[int, ray.ObjectRef[WorkerFacts]]) -> dict[int, WorkerFacts]:
        """Waits for the facts that new processes report about themselves. Raises TrainingError after START_S seconds."""
        until, waiting = time.monotonic() + START_S, list(calls.values())
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            self._go_on()
            if waiting and time.monotonic() > until:
                late = f"{len(waiting)} of {len(calls)}"
                raise TrainingError(f"can't start the workers' processes: {late} didn't answer within {START_S:.0f} s")
        try:
            return {slot: ray.get(answer) for slot, answer in calls.items()}
        except ray.exceptions.RayError as e:
            raise TrainingError(f"can't start the workers' processes: {brief(e)}") from e


def places(members: Sequence[Member]) -> list[WorkerPlace]:
    """Assigns each member its rank and its rendezvous, in order. Ranks count up within a node, then continue on the next node."""
    return places_at(members, meeting(members[0]))


def places_at(members: Sequence[Member], rendezvous: str) -> list[WorkerPlace]:
    by_node: dict[str, list[Member]] = {}
    for member in members:
        by_node.setdefault(member.node, []).append(member)
    gpus = {node: tuple(gpu for one in here for gpu in one.gpus) for node, here in by_node.items()}
    return [
        WorkerPlace(
            rank=rank,
            world=len(members),
            local_rank=by_node[member.node].index(member),
            local_world=len(by_node[member.node]),
            rendezvous=rendezvous,
            backend="nccl" if member.gpus else "gloo",
            gpus=gpus[member.node],
        )
        for rank, member in enumerate(members)
    ]


def meeting(first: Member) -> str:
    """Creates a new rendezvous address, so that a process group can't connect to the address of an earlier group.

    The rendezvous is a file in the session's folder on a private Ray, and a TCP port of the first worker on other clusters. A TCP
    port needs no token: any process that reaches it can write what the workers read, and pose as one of them. On a machine with
    other users, even a port on loopback has this danger. The workers of a private Ray are all on one machine. So a file, which
    only this user can open, is enough.
    """
    if os.environ.get("RAY_ADDRESS"):
        return f"tcp://{first.address}:{ray.get(first.actor.free_port.remote(), timeout=PORT_S)}"
    return f"file://{ray_internals.session_folder() / f'group-{uuid.uuid4().hex}'}"
