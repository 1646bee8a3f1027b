"""Holds the processes of a run's workers, which outlive attempts: Ray actors in a placement group.

    with Pool(job.workers) as pool:
        members = pool.take(2)      # two new processes
        ...
        pool.drop(member)           # it has died, or is not to be used again
        members = pool.take(2)      # the survivor, and a new one in the dead one's place

The placement group holds the resources of exactly the workers that were taken last. One of another size, or on nodes that have
gone or are about to, is given back, with all processes in it, before another is asked for.
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
from heliostat.errors import PlacementError, TrainingError
from heliostat.text import brief
from heliostat.train.worker.process import TrainWorker

log = logging.getLogger(__name__)

PLACE_S = 30.0  # for resources; then there may be room for fewer workers
START_S = 120.0  # for the processes to start and answer
ANSWER_S = 10.0  # for one that is there
POLL_S = 0.05
NODE_ID = "ray.io/node-id"  # the label that Ray gives every node


@dataclass(frozen=True)
class Member:
    """Holds a worker's process: its actor, and what it says of itself."""

    slot: int  # the bundle of the placement group
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
        self._closed = threading.Event()
        self._group: PlacementGroup | None = None
        self._members: dict[int, Member] = {}
        self.avoided: set[str] = set()  # nodes that take no workers

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def held(self) -> Counter[str]:
        """Counts, by node, for how many workers the pool holds resources there, on nodes that stay."""
        return Counter(self._placed(self._group).values())

    def take(self, count: int, patient: bool = True) -> list[Member]:
        """Returns this many processes that live, by node and GPU; TrainingError if they do not start.

        Waits for their resources, if not `patient` for 30 s: then there may be room for fewer, and it is a PlacementError.
        """
        try:
            group = self._place(count, patient)
            self._check()
            self._members |= self._start(group, [slot for slot in range(count) if slot not in self._members])
            self._go_on()
        except BaseException:
            if self._closed.is_set():
                self._give_back()
            raise
        return sorted(self._members.values(), key=lambda m: (m.address, m.node, [gpu.zfill(4) for gpu in m.gpus], m.slot))

    def drop(self, member: Member) -> None:
        """Ends a process, if it lives; its resources stay the pool's."""
        if self._members.get(member.slot) is member:
            del self._members[member.slot]
        ray.kill(member.actor)

    def close(self) -> None:
        """Ends all processes, gives their resources back, and ends a `take` that waits in another thread."""
        self._closed.set()
        self._give_back()

    def reopen(self) -> None:
        """Makes a closed pool one that can be taken from, once no other thread waits in it."""
        self._closed.clear()

    # resources -------------------------------------------------------------------------------------------------------

    def _place(self, count: int, patient: bool) -> PlacementGroup:
        """Waits until the placement group holds the resources of this many workers, on nodes that stay."""
        group = self._group
        if group is None or group.bundle_count != count or len(self._placed(group)) != count:
            self._give_back()
            self._group = group = self._reserve(count)
        began = time.monotonic()
        self.waiting.set()
        try:
            while (placed := len(self._placed(group))) < count:
                self._go_on()
                if not patient and time.monotonic() - began > PLACE_S:
                    self._give_back()
                    have = f"{placed} of {count} workers"
                    raise PlacementError(f"the workers could not be placed: there is room for {have} after {PLACE_S:.0f} s")
                time.sleep(POLL_S)
        finally:
            self.waiting.clear()
            self.waited_s = time.monotonic() - began
        return group

    def _go_on(self) -> None:
        if self._closed.is_set():
            raise PlacementError("the workers are no longer wanted")

    def _reserve(self, count: int) -> PlacementGroup:
        workers = self.workers
        need = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
        wanted = {**workers.labels, **({NODE_ID: f"!in({','.join(sorted(self.avoided))})"} if self.avoided else {})}
        labels = {"bundle_label_selector": [wanted] * count} if wanted else {}
        return placement_group([need] * count, strategy=workers.placement.upper(), **labels)

    def _placed(self, group: PlacementGroup | None) -> dict[int, str]:
        """Maps the group's bundles that are placed to their nodes; not those on nodes that have gone, or are about to."""
        if group is None:
            return {}
        alive, leaving = nodes.carrying({}), nodes.draining() | self.avoided
        placed = placement_group_table(group).get("bundles_to_node_id", {})
        return {bundle: node for bundle, node in placed.items() if node in alive and node not in leaving}

    def _give_back(self) -> None:
        for member in list(self._members.values()):
            self.drop(member)
        group, self._group = self._group, None
        if group is not None:
            remove_placement_group(group)

    # processes -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Drops the processes that do not answer, or are not to be used again."""
        asked = {member: member.actor.facts.remote() for member in self._members.values()}
        until = time.monotonic() + ANSWER_S
        for member, answer in asked.items():
            try:
                spent = ray.get(answer, timeout=max(0.0, until - time.monotonic()))["spent"]
            except ray.exceptions.RayError as e:
                log.debug("a worker's process is not used again: %s", e)
                spent = True
            if spent:
                self.drop(member)

    def _start(self, group: PlacementGroup, slots: list[int]) -> dict[int, Member]:
        workers = self.workers
        actor: Any = ray.remote(TrainWorker)
        actors = {
            slot: actor.options(
                num_cpus=workers.cpus,
                num_gpus=workers.gpus or None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, slot),
                runtime_env=remote_environment(workers.gpus) or None,
            ).remote()
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

    def _answers(self, asked: dict[int, Any]) -> dict[int, dict[str, Any]]:
        """Waits for what new processes say of themselves."""
        until, waiting = time.monotonic() + START_S, list(asked.values())
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            self._go_on()
            if waiting and time.monotonic() > until:
                late = f"{len(waiting)} of {len(asked)}"
                raise TrainingError(f"the workers' processes could not be started: {late} did not answer within {START_S:.0f} s")
        try:
            return {slot: ray.get(answer) for slot, answer in asked.items()}
        except ray.exceptions.RayError as e:
            raise TrainingError(f"the workers' processes could not be started: {brief(e)}") from e
