"""Holds the processes of a run's workers, which outlive attempts: Ray actors in placement groups.

    with Pool(job.workers) as pool:
        members = pool.take(2)      # two processes: those that are there, and new ones for what is missing
        ...
        pool.drop(member)           # it has died, or is not to be used again
        members = pool.take(2)      # the survivor, and a new one in the dead one's place

A placement group holds the resources of the first `take`; another is added when more are wanted. Ray moves what a lost node has
held to another node where there is room; until then that part waits, and is no part of what the pool holds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from heliostat.cluster import nodes
from heliostat.cluster.connect import remote_environment
from heliostat.config.spec import Workers
from heliostat.errors import PlacementError
from heliostat.train.worker.process import TrainWorker

log = logging.getLogger(__name__)

PLACE_S = 30.0  # for resources; then there may be room for fewer workers
START_S = 120.0  # for the processes to start and answer
ANSWER_S = 10.0  # for one that is there
POLL_S = 0.05
Slot = tuple[int, int]  # a placement group's index, and the bundle's in it


@dataclass(frozen=True)
class Member:
    """Holds a worker's process: its actor, and what it says of itself."""

    slot: Slot
    actor: Any
    pid: int
    node: str
    address: str
    gpus: tuple[str, ...]


class Pool:
    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.waiting = threading.Event()  # for resources
        self.waited_s = 0.0  # for resources, by the last `take`
        self._closed = False
        self._groups: list[PlacementGroup] = []
        self._members: dict[Slot, Member] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.end()

    def held(self) -> Counter[str]:
        """Counts, by node, for how many workers the pool holds resources there, on nodes that stay."""
        return Counter(self._placed().values())

    def take(self, count: int, patient: bool = True) -> list[Member]:
        """Returns this many processes that live, by node and GPU; PlacementError if they do not start.

        Waits for their resources, if not `patient` for 30 s: then there may be room for fewer, and it is a PlacementError too.
        """
        placed = self._place(count, patient)
        self._check()
        for slot in [s for s in self._members if s not in placed]:
            self._members.pop(slot)  # its node has gone, or is about to
        kept = sorted(self._members)[:count]
        for slot in self._members.keys() - set(kept):
            self.drop(self._members[slot])
        new = [slot for slot in sorted(placed) if slot not in self._members][: count - len(kept)]
        self._members |= self._start(new)
        if self._closed:
            self.end()
            raise PlacementError("the workers are no longer wanted")
        return sorted(self._members.values(), key=lambda m: (m.address, m.node, [gpu.zfill(4) for gpu in m.gpus], m.slot))

    def drop(self, member: Member) -> None:
        """Ends a process, if it lives; its resources stay the pool's."""
        self._members.pop(member.slot, None)
        ray.kill(member.actor)

    def close(self) -> None:
        """Ends a `take` that waits, in another thread, and the pool with it."""
        self._closed = True

    def end(self) -> None:
        """Ends all processes and gives their resources back."""
        for member in list(self._members.values()):
            self.drop(member)
        while self._groups:
            remove_placement_group(self._groups.pop())

    # resources -------------------------------------------------------------------------------------------------------

    def _place(self, count: int, patient: bool) -> dict[Slot, str]:
        """Waits until the pool holds the resources of this many workers; returns the node of each slot that it holds."""
        wanted = count - sum(group.bundle_count for group in self._groups)
        if wanted > 0:
            if self._groups and self.workers.placement.startswith("strict"):
                self.end()  # what is added to a group need not be where the group is
                wanted = count
            self._groups.append(self._reserve(wanted))
        began = time.monotonic()
        self.waiting.set()
        try:
            while len(placed := self._placed()) < count:
                if self._closed:
                    raise PlacementError("the workers are no longer wanted")
                if not patient and time.monotonic() - began > PLACE_S:
                    self._give_back_what_waits()
                    have = f"{len(placed)} of {count} workers"
                    raise PlacementError(f"the workers could not be placed: there is room for {have} after {PLACE_S:.0f} s")
                time.sleep(POLL_S)
        finally:
            self.waiting.clear()
            self.waited_s = time.monotonic() - began
        return placed

    def _reserve(self, count: int) -> PlacementGroup:
        workers = self.workers
        need = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
        labels = {"bundle_label_selector": [dict(workers.labels)] * count} if workers.labels else {}
        return placement_group([need] * count, strategy=workers.placement.upper(), **labels)

    def _placed(self) -> dict[Slot, str]:
        leaving, placed = nodes.draining(), dict[Slot, str]()
        alive = nodes.carrying({})
        for number, group in enumerate(self._groups):
            for bundle, node in placement_group_table(group)["bundles_to_node_id"].items():
                if node in alive and node not in leaving:
                    placed[number, bundle] = node
        return placed

    def _give_back_what_waits(self) -> None:
        """Gives back groups that are not placed whole, so that another run, or fewer workers, can have the room."""
        for number in reversed(range(len(self._groups))):
            if placement_group_table(self._groups[number])["state"] != "CREATED" and number == len(self._groups) - 1:
                for slot in [s for s in self._members if s[0] == number]:
                    self.drop(self._members[slot])
                remove_placement_group(self._groups.pop())

    # processes -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Drops the processes that do not answer, or were told to end."""
        asked = {member: member.actor.facts.remote() for member in self._members.values()}
        until = time.monotonic() + ANSWER_S
        for member, answer in asked.items():
            try:
                told_to_end = ray.get(answer, timeout=max(0.0, until - time.monotonic()))["told_to_end"]
            except ray.exceptions.RayError as e:
                log.debug("a worker's process is not used again: %s", e)
                told_to_end = True
            if told_to_end:
                self.drop(member)

    def _start(self, slots: list[Slot]) -> dict[Slot, Member]:
        workers = self.workers
        actor: Any = ray.remote(TrainWorker)
        actors = {
            slot: actor.options(
                num_cpus=workers.cpus,
                num_gpus=workers.gpus or None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._groups[slot[0]], slot[1]),
                runtime_env=remote_environment(workers.gpus) or None,
            ).remote()
            for slot in slots
        }
        asked = {slot: one.facts.remote() for slot, one in actors.items()}
        try:
            facts = dict(zip(asked, ray.get(list(asked.values()), timeout=START_S), strict=True))
        except ray.exceptions.RayError as e:
            for one in actors.values():
                ray.kill(one)
            raise PlacementError(f"the workers' processes could not be started: {str(e).splitlines()[0]}") from e
        return {
            slot: Member(slot, actors[slot], f["pid"], f["node"], f["address"], tuple(f["gpus"])) for slot, f in facts.items()
        }
