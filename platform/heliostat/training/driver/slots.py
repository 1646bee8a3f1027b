"""Holds the resources of a run's workers: a placement group of one bundle for each, so that one worker's can be given back alone.

    slots = Slots(job.workers, stop)
    slots.fill(3)            # waits for three, all or none
    slots.give_back([2])     # the others stay as they are

Several are taken together or not at all: where they do not fit now, a placement group of all that are missing queues for them
and holds nothing until Ray can place it whole; what it then was given is exchanged for groups of one bundle. Where the rest does
not come within some seconds, what a run holds already is given back too: no half-placed run holds resources for long.
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

PLACE_S = 30.0  # for resources; then there may be room for fewer workers
AT_ONCE_S = 2.0  # for resources that are free
AGAIN_S = 3.0  # at most, before a queue is joined again that another run was faster in
AVOID_S = 60.0  # for a node that does not answer; by then Ray knows whether it lives
POLL_S, FAST_POLL_S = 0.05, 0.005


@dataclass(frozen=True)
class Slot:
    """Holds the resources of one worker, on a node."""

    number: int
    group: PlacementGroup
    node: str


class Slots:
    def __init__(self, workers: Workers, stop: threading.Event) -> None:
        """Prepares to hold resources for workers; `stop` ends what waits for them."""
        self.workers, self._stop = workers, stop
        self.waiting = threading.Event()  # for resources
        self.held: dict[int, Slot] = {}
        self._numbers = itertools.count()
        self._avoided: dict[str, float] = {}
        self._open: list[PlacementGroup] = []  # asked for, and in no slot yet

    def avoid(self, out: Iterable[str], for_good: bool = False) -> None:
        """Takes nodes for lost, for some time, before Ray knows that they are; or `for_good`, though they live."""
        until = math.inf if for_good else time.monotonic() + AVOID_S
        for node in out:
            self._avoided[node] = max(until, self._avoided.get(node, 0.0))

    def avoided(self) -> set[str]:
        return {node for node, until in self._avoided.items() if time.monotonic() < until}

    def staying(self) -> list[Slot]:
        """Lists the slots on nodes that live and are not about to go."""
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
        """Chooses the slots that are not needed for so many workers: those without a process first, then by placement.

        Packed workers leave the nodes that hold the fewest of them, others those that hold the most. `used`: those with one.
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
        """Waits until resources of `count` workers are held; if not `patient`, PlacementError where they are not within 30 s."""
        self.waiting.set()
        try:
            if not self._take_free(count - len(self.held)):
                self._queue(count, patient)
        finally:
            self.waiting.clear()

    def _take_free(self, missing: int) -> bool:
        """Takes resources that are free now, if all that are missing are."""
        per_node = Counter(s.node for s in self.held.values())
        free, leaving = nodes.free(self.workers.labels), nodes.draining() | self.avoided()
        spots_found = spots(self.workers, {n: r for n, r in free.items() if n not in leaving}, per_node, missing)
        return spots_found is not None and self._pin(spots_found)

    def _pin(self, nodes: list[str]) -> bool:
        """Holds a slot on each of the nodes, if all of them can be had within some seconds, else none."""
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
        """Queues for what is missing, behind others, without holding a part of it."""
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
                        raise PlacementError(f"can't place the workers: the cluster has room for {have} after {PLACE_S:.0f} s")
                    log.warning("the cluster has room for %s. Releasing it until there is room for all", have)
                    break
                time.sleep(POLL_S)
            self._drop_open()
            if nodes and self._pin(nodes):
                return
            time.sleep(random.uniform(0, AGAIN_S) if nodes else 0)  # so that of two runs one is faster

    def _ask(self, only: list[str] | None, count: int) -> PlacementGroup:
        """Asks for a placement group: on one of the nodes `only`, or on any that may be used."""
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
    """Lists the nodes of a placement group's bundles, in their order; empty until all are placed."""
    nodes: dict[int, str] = placement_group_table(group).get("bundles_to_node_id", {})
    return [nodes[bundle] for bundle in sorted(nodes)] if nodes and all(nodes.values()) else []
