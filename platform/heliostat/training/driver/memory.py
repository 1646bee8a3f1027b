"""Manages in-memory checkpoints: creates a keeper (an actor that stores copies) on each node, and finds the newest complete
generation of copies.

A generation is used only if it is complete: it must have a sealed copy of every worker's part. All copies must be of the same
attempt, step, and world size, and share the same facts. Each copy must still have the checksums that it was sealed with.
Otherwise the run resumes from storage.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import ray
from ray.actor import ActorHandle

from heliostat.cluster.connect import remote_environment
from heliostat.config.spec import Job
from heliostat.training import memory_keeper
from heliostat.training.driver.pool import Member
from heliostat.training.memory_keeper import CopyFacts, CopySource, MemoryKeeper, MemoryPlan

log = logging.getLogger(__name__)

ANSWER_S = 10.0
CHECK_S = 120.0  # seconds for the checksums of a node's copies

T = TypeVar("T")
Held = tuple[str, int, CopyFacts]  # id, rank, and the facts that the generation shares


class Memory:
    """Owns the keepers of a run. A keeper is an actor that stores a node's in-memory checkpoints. Leaving `with Memory(job) as
    memory:` ends the keepers."""

    def __init__(self, job: Job) -> None:
        self.on, self._gpus = job.checkpoint.memory_every is not None, job.workers.gpus
        self._keepers: dict[str, ActorHandle[MemoryKeeper]] = {}

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    def forget(self) -> None:
        """Ends the keepers, and so deletes all copies."""
        for keeper in self._keepers.values():
            ray.kill(keeper)
        self._keepers = {}

    def newest(self, attempt: int, at_least: int, data: str, avoided: Collection[str] = ()) -> CopySource | None:
        """Finds the newest complete in-memory checkpoint (a generation: one copy per worker) whose step is at least `at_least`.
        Skips generations with a damaged copy.

        `attempt`: the attempt that begins; copies of earlier attempts can't arrive any more. `data`: the digest of the data plan
        that the generation must have.
        """
        keepers = {node: keeper for node, keeper in self._keepers.items() if node not in avoided}
        admitted: dict[str, None] = self._answers({n: k.admit.remote(attempt) for n, k in keepers.items()}, ANSWER_S)
        keepers = {node: keepers[node] for node in admitted}
        copies: Mapping[str, list[Held]] = self._answers({n: k.held.remote() for n, k in keepers.items()}, ANSWER_S)
        for id, step, world in whole(copies, data):
            if step < at_least:
                break
            intact: dict[str, list[int]] = self._answers({n: keepers[n].intact.remote(id) for n in copies}, CHECK_S)
            holders = {rank: [(n, keepers[n]) for n, ranks in intact.items() if rank in ranks] for rank in range(world)}
            damaged = [rank for rank in range(world) if not holders[rank]]
            if not damaged:
                return CopySource(id, step, world, holders, at_least)
            log.warning(
                "step %d: the in-memory checkpoint of worker %d is damaged (checksum), so heliostat doesn't use it",
                step,
                damaged[0],
            )
        return None

    def plan(self, attempt: int, members: Sequence[Member], source: CopySource | None) -> MemoryPlan | None:
        """Plans an attempt's in-memory checkpoints, and starts keepers on nodes that have none. Returns None if the job wants no
        in-memory checkpoints."""
        if not self.on:
            return None
        nodes = list(dict.fromkeys(m.node for m in members))
        sources = {node for holders in source.holders.values() for node, _ in holders} if source else set()
        for node in self._keepers.keys() - {*nodes, *sources}:
            ray.kill(self._keepers.pop(node))
        environment = remote_environment(self._gpus)
        living: dict[str, int] = self._answers(
            {n: k.begin.remote(attempt, source and source.id) for n, k in self._keepers.items()}, ANSWER_S
        )
        if refused := sum(living.values()):
            log.debug("rejected %d in-memory checkpoints that arrived after their attempt had ended", refused)
        for node in nodes:
            if node not in living:
                self._keepers[node] = memory_keeper.make(node, attempt, environment)
        pairs = {node: list(dict.fromkeys([node, nodes[(i + 1) % len(nodes)]])) for i, node in enumerate(nodes)}
        return MemoryPlan(attempt, [[self._keepers[n] for n in pairs[m.node]] for m in members], source)

    def _answers(self, calls: Mapping[str, ray.ObjectRef[T]], seconds: float) -> dict[str, T]:
        """Waits at most `seconds` for the answers of the keepers, and returns these answers by node. Ends the keepers that don't
        answer in time."""
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds) if calls else ([], [])
        answers = {}
        for node, call in calls.items():
            try:
                answers[node] = ray.get(call, timeout=0 if call in done else 0.001)
            except ray.exceptions.RayError as e:
                log.debug("the in-memory checkpoints on node %s are lost: %s", node, e)
                if keeper := self._keepers.pop(node, None):  # None: an earlier check of another generation ended it
                    ray.kill(keeper)
        return answers


def whole(by_node: Mapping[str, Iterable[Held]], data: str) -> list[tuple[str, int, int]]:
    """Lists the generations for which every rank's copy exists, as (id, step, world), newest first.

    `by_node`: the sealed copies by node. `data`: has the same meaning as in `Memory.newest`. A generation whose copies differ in
    their shared facts is incomplete, and isn't listed.
    """
    by_id: dict[str, list[tuple[int, CopyFacts]]] = {}
    for copies in by_node.values():
        for id, rank, facts in copies:
            by_id.setdefault(id, []).append((rank, facts))
    generations = []
    for id, ranks in by_id.items():
        first = ranks[0][1]
        agree = all(facts == first for _, facts in ranks) and first.data == data
        if agree and {rank for rank, _ in ranks} == set(range(first.world)):
            generations.append((id, first.step, first.world))
    return sorted(generations, key=lambda g: -g[1])
