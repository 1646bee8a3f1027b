"""Keeps in-memory checkpoints: copies of the training state in the memory of a node.

Each node of a run has one keeper, an actor that outlives the workers.

A copy is the part of the state that one worker has after one step, as bytes. A copy arrives in pieces, several at a time, and the
keeper checksums each piece on arrival. A copy is valid once it is sealed: it is then complete, and its checksums equal the
checksums that its worker computed. Copies with the same id form a *generation*: one copy per worker of an attempt, after the same
step. A keeper keeps two generations, because the newest may be incomplete. A keeper accepts only copies of the current attempt,
and counts rejected copies.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import ray
import xxhash
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

KEPT = 2  # generations in a keeper
THREADS = 4  # threads of a keeper, so it copies and checksums this many pieces at the same time

Layout = list[tuple[str, int, int, int, int]]  # the fields of each `checkpoint.flat_copy.FlatRange`


@dataclass(frozen=True)
class CopyFacts:
    """Holds the facts that all copies of a generation share. `data`: digest of the run's data plan. `resume`: the facts that a
    worker needs to resume (`training.worker.training_state.ResumeFacts`; a keeper doesn't import its module)."""

    step: int
    world: int
    data: str
    resume: dict[str, Any]


@dataclass(frozen=True)
class CopySource:
    """Identifies the generation that an attempt starts from. `holders`: by rank, the nodes that have this rank's copy, with the
    keeper of each node."""

    id: str
    step: int
    world: int
    holders: dict[int, list[tuple[str, ActorHandle[MemoryKeeper]]]]
    saved: int  # step of the newest checkpoint in storage, 0 if there is none


@dataclass(frozen=True)
class MemoryPlan:
    """Holds an attempt's plan for in-memory checkpoints: its number, each rank's keepers, and the generation that the attempt
    starts from, if any."""

    attempt: int
    keepers: list[list[ActorHandle[MemoryKeeper]]]  # by rank: its own node's keeper, and another node's if there is one
    source: CopySource | None = None


@dataclass(frozen=True, order=True)
class Sum:
    """Holds the checksum of `size` bytes of a copy, beginning at byte `start`."""

    start: int
    size: int
    value: int


def generation(attempt: int, step: int) -> str:
    """Returns the id of the generation that an attempt makes after a step."""
    return f"{attempt}:{step}"


def attempt_of(id: str) -> int:
    """Returns the number of the attempt that made the generation with this id."""
    return int(id.partition(":")[0])


def summed(data: np.ndarray, start: int) -> Sum:
    """Computes the XXH3 checksum of a piece that begins at byte `start` of its copy.

    Runs at memory speed, and lets other threads run meanwhile.
    """
    return Sum(start, len(data), xxhash.xxh3_64_intdigest(data.data))


@dataclass
class Copy:
    """Holds one worker's copy of the training state. When the copy is complete, sealing sets its `facts`, its `layout`, and
    `own`: the part of the state that no other worker has.

    `own` is encoded by `wire`, because a keeper doesn't import its classes.
    """

    data: np.ndarray
    arrived: list[Sum] = field(default_factory=list)
    facts: CopyFacts | None = None
    layout: Layout = field(default_factory=list)
    own: bytes = b""

    @property
    def intact(self) -> bool:
        return all(summed(self.data[one.start : one.start + one.size], one.start) == one for one in self.arrived)


class MemoryKeeper:
    def __init__(self, attempt: int = 0) -> None:
        self._attempt, self._refused = attempt, 0
        self._reserved: dict[int, int] = {}
        self._copies: dict[tuple[str, int], Copy] = {}  # by id and rank, oldest first
        self._unused: list[np.ndarray] = []  # reused, because allocating memory takes more time than the copy
        self._changing = threading.Lock()

    def admit(self, attempt: int) -> None:
        """Accepts only copies of this attempt from now on."""
        with self._changing:
            self._attempt = attempt

    def begin(self, attempt: int, id: str | None) -> int:
        """Begins an attempt: drops all copies except the copies of generation `id`, from which the attempt starts.

        Returns the number of copies of earlier attempts that were rejected since the last call.
        """
        with self._changing:
            self._attempt, refused, self._refused = attempt, self._refused, 0
            self._reserved, self._unused = {}, []
            self._copies = {key: copy for key, copy in self._copies.items() if key[0] == id}
            return refused

    def reserve(self, rank: int, size: int) -> None:
        """Records that a worker will keep copies of `size` bytes."""
        with self._changing:
            self._reserved[rank] = KEPT * size

    def need(self) -> int:
        """Computes the bytes that all reserved copies take together."""
        with self._changing:
            return sum(self._reserved.values())

    def open(self, id: str, rank: int, size: int) -> None:
        """Begins a copy. If the copy belongs to a new generation, drops the oldest generation. Raises ValueError if the copy's
        attempt has ended."""
        with self._changing:
            self._require_present(id)
            ids = list(dict.fromkeys([*(of for of, _ in self._copies), id]))
            for key in [key for key in self._copies if key[0] not in ids[-KEPT:]]:
                self._unused.append(self._copies.pop(key).data)
            fits = next((i for i, data in enumerate(self._unused) if len(data) == size), None)
            self._copies[id, rank] = Copy(np.empty(size, np.uint8) if fits is None else self._unused.pop(fits))

    def write(self, id: str, rank: int, start: int, data: np.ndarray) -> None:
        """Stores a piece of a copy at byte `start`. Pieces arrive in any order. Raises ValueError if the copy's attempt has
        ended."""
        self._require_present(id)
        copy = self._copies[id, rank]
        place = copy.data[start : start + len(data)]
        place[:] = data
        copy.arrived.append(summed(place, start))

    def seal(self, id: str, rank: int, sums: list[Sum], facts: CopyFacts, layout: Layout, own: bytes) -> None:
        """Completes a copy.

        Raises ValueError if the checksums of the copy's pieces differ from the worker's checksums, or if the copy's attempt has
        ended.
        """
        with self._changing:
            self._require_present(id)
            copy = self._copies[id, rank]
            if sorted(copy.arrived) != sorted(sums) or sum(one.size for one in sums) != len(copy.data):
                del self._copies[id, rank]
                raise ValueError("an in-memory checkpoint arrived damaged (wrong checksum), so heliostat doesn't use it")
            copy.facts, copy.layout, copy.own = facts, layout, own

    def _require_present(self, id: str) -> None:
        """Raises ValueError for a copy of an earlier attempt, and counts this copy as rejected."""
        if (attempt := attempt_of(id)) != self._attempt:
            self._refused += 1
            raise ValueError(f"rejected an in-memory checkpoint of attempt {attempt} in attempt {self._attempt}")

    def held(self) -> list[tuple[str, int, CopyFacts]]:
        """Lists the sealed copies. For each copy: its id, its rank, and the facts that all copies of its generation share."""
        with self._changing:
            return [(id, rank, copy.facts) for (id, rank), copy in self._copies.items() if copy.facts]

    def intact(self, id: str) -> list[int]:
        """Lists the ranks whose copies of a generation still have the checksums that they were sealed with."""
        with self._changing:
            sealed = [(rank, copy) for (of, rank), copy in self._copies.items() if of == id and copy.facts]
        return [rank for rank, copy in sealed if copy.intact]

    def described(self, id: str, rank: int) -> tuple[CopyFacts | None, Layout]:
        return self._copies[id, rank].facts, self._copies[id, rank].layout

    def own(self, id: str, rank: int) -> bytes:
        return self._copies[id, rank].own

    def read(self, id: str, rank: int, ranges: list[tuple[int, int]]) -> np.ndarray:
        """Reads byte ranges (start, stop) of a copy and concatenates them."""
        data = self._copies[id, rank].data
        return np.concatenate([data[start:stop] for start, stop in ranges])


def make(node: str, attempt: int, runtime_env: Mapping[str, object]) -> ActorHandle[MemoryKeeper]:
    """Creates the keeper of a node in an attempt."""
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(MemoryKeeper).options(
        num_cpus=0, scheduling_strategy=where, runtime_env=runtime_env or None, max_concurrency=THREADS
    )
    return cast("ActorHandle[MemoryKeeper]", actor.remote(attempt))
