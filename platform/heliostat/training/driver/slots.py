"""Holds the resources of a run's workers. Each worker has its own placement group of one bundle, which the run can release
separately.

    slots = Slots(job.workers, stop)
    slots.fill(3)            # waits for three slots, all or none
    slots.give_back([2])     # the other slots stay

A run takes all missing slots together, or none of them. If the slots don't fit now, one placement group for all missing slots
waits in Ray's queue. The group reserves nothing until Ray can place it completely; then groups of one bundle replace this group.
If the missing slots don't come within 30 seconds, the run releases the slots that it holds. So no half-placed run holds resources
for long.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from heliostat.cluster import nodes
from heliostat.cluster.capacity import spots
from heliostat.cluster.nodes import NODE_ID
from heliostat.config.spec import Workers
from heliostat.errors import PlacementError

log = logging.getLogger(__name__)

PLACE_S = 30.0  # seconds to wait for resources; after that there may be room for fewer workers
AT_ONCE_S = 2.0  # seconds to wait for resources that are free
AGAIN_S = 3.0  # longest pause before queuing again, after another run took the resources
AVOID_S = 60.0  # seconds to avoid a node that doesn't answer; after that Ray knows whether it lives
POLL_S, FAST_POLL_S = 0.05, 0.005


@dataclass(frozen=True)
class Slot:
    """Holds the resources of one worker on one node."""

    number: int
    group: PlacementGroup
    node: str


class Slots:
    def __init__(self, workers: Workers, stop: threading.Event) -> None:
        """Prepares to hold resources for workers. Setting `stop` ends every wait for resources."""
        self.workers, self._stop = workers, stop
        self.waiting = threading.Event()  # set while `fill` waits for resources
        self.held: dict[int, Slot] = {}
        self._numbers = itertools.count()
        self._avoided: dict[str, float] = {}
        self._open: list[PlacementGroup] = []  # requested, but not in a slot yet

    def avoid(self, out: Iterable[str], for_good: bool = False) -> None:
        """Treats nodes as lost for some time, before Ray knows that the nodes are lost.

        `for_good`: excludes the nodes permanently, although they are still running.
        """
        until = math.inf if for_good else time.monotonic() + AVOID_S
        for node in out:
            self._avoided[node] = max(until, self._avoided.get(node, 0.0))

    def avoided(self) -> set[str]:
        return {node for node, until in self._avoided.items() if time.monotonic() < until}

    def staying(self) -> list[Slot]:
        """Lists the slots on nodes that live and aren't about to leave."""
        alive, leaving = nodes.carrying({}), nodes.draining() | self.avoided()
        return [s for s in self.held.values() if s.node in alive and s.node not in leaving]

    def give_back(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            if slot := self.held.pop(number, None):
                remove_placement_group(slot.group)

    def give_all_back(self) -> None:
        self.give_back(self.held)
        self._drop_open()

    def surplus(self, count: int, used: Collection[int]) -> list[int]:
        """Chooses the slots to release so that `count` remain: first those without a process, then by placement.

        With placement `pack`, the nodes with the fewest workers lose their slots first; otherwise the nodes with the most
        workers. `used`: the numbers of slots with a process.
        """
        left, over = list(self.held.values()), list[int]()
        while len(left) > count:
            per_node = Counter(s.node for s in left)
            fewest = 1 if self.workers.placement == "pack" else -1
            out = min(left, key=lambda s: (s.number in used, fewest * per_node[s.node], -s.number))
            left.remove(out)
            over.append(out.number)
        return over

    def fill(self, count: int, patient: bool = True) -> None:
        """Waits until the run holds the resources of `count` workers. If not `patient`, raises PlacementError after 30 s."""
        self.waiting.set()
        try:
            if not self._take_free(count - len(self.held)):
                self._queue(count, patient)
        finally:
            self.waiting.clear()

    def _take_free(self, missing: int) -> bool:
        """Takes free resources if they are enough for all missing slots. Returns whether it took the resources."""
        per_node = Counter(s.node for s in self.held.values())
        free, leaving = nodes.free(self.workers.labels), nodes.draining() | self.avoided()
        spots_found = spots(self.workers, {n: r for n, r in free.items() if n not in leaving}, per_node, missing)
        return spots_found is not None and self._pin(spots_found)

    def _pin(self, nodes: list[str]) -> bool:
        """Takes a slot on each of the nodes if all are available within AT_ONCE_S seconds.

        If one of the nodes isn't available in time, takes no slot. Returns whether it took the slots.
        """
        groups = self._open = [self._ask([node], 1) for node in nodes]
        until = time.monotonic() + AT_ONCE_S
        while not all(map(placed, groups)):
            self._go_on()
            if time.monotonic() > until:
                self._drop_open()
                return False
            time.sleep(FAST_POLL_S)
        slots = [Slot(next(self._numbers), group, node) for group, node in zip(groups, nodes, strict=True)]
        self.held |= {slot.number: slot for slot in slots}
        self._open = []
        return True

    def _queue(self, count: int, patient: bool) -> None:
        """Waits in Ray's queue for all missing slots, after earlier requests. Takes all missing slots or none."""
        until = time.monotonic() + PLACE_S
        while True:
            ticket, whole = self._ask(None, count - len(self.held)), not self.held
            self._open = [ticket]
            while not (nodes := placed(ticket)):
                self._go_on()
                if time.monotonic() > until and not (whole and patient):
                    have = f"{len(self.held)} of {count} workers"
                    self.give_all_back()
                    if not patient:
                        raise PlacementError(
                            f"can't place the workers: after {PLACE_S:.0f} s, the cluster has room only for {have}"
                        )
                    log.warning(
                        "the cluster has room for %s. Releasing these resources until there is room for all workers", have
                    )
                    break
                time.sleep(POLL_S)
            self._drop_open()
            if nodes and self._pin(nodes):
                return
            time.sleep(random.uniform(0, AGAIN_S) if nodes else 0)  # random, so that one of two competing runs is faster

    def _ask(self, only: list[str] | None, count: int) -> PlacementGroup:
        """Requests a placement group of `count` bundles: on the node in `only`, or on any node that may be used."""
        workers = self.workers
        need = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
        taken = {s.node for s in self.held.values()} if workers.placement == "strict_spread" else set()
        out = self.avoided() | taken
        where = {NODE_ID: only[0]} if only else {NODE_ID: f"!in({','.join(sorted(out))})"} if out else {}
        labels = [{**workers.labels, **where}] * count if workers.labels or where else None
        return placement_group([need] * count, strategy=workers.placement.upper(), bundle_label_selector=labels)

    def _drop_open(self) -> None:
        groups, self._open = self._open, []
        for group in groups:
            remove_placement_group(group)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise PlacementError("the run no longer needs the workers")


def placed(group: PlacementGroup) -> list[str]:
    """Lists the nodes of a placement group's bundles, in bundle order. The list is empty until all bundles are placed."""
    nodes: dict[int, str] = placement_group_table(group).get("bundles_to_node_id", {})
    return [nodes[bundle] for bundle in sorted(nodes)] if nodes and all(nodes.values()) else []
