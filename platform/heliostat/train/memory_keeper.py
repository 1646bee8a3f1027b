"""Keeps copies of the training state in the memory of a node: an actor for each node of a run, which outlives the workers.

A copy is what one worker holds of the state behind one step, as bytes. It counts once it is sealed: complete, and with the
checksum that its worker computed. Copies with the same id belong together, as one *generation*: one for each worker of an
attempt, behind the same step. Two generations stay, because the newest may not be complete yet.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

KEPT = 2  # generations

# of a copy: step, world, common (what is the same for all workers), layout, own (what is this worker's alone)
Told = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Identifies the generation that an attempt starts from, and who has its copies: by rank, the nodes and their keepers."""

    id: str
    step: int
    world: int
    holders: dict[int, list[tuple[str, Any]]]
    saved: int  # step of the newest checkpoint in storage, 0 if there is none


@dataclass(frozen=True)
class Plan:
    """Holds what an attempt does with memory: its own id, each rank's keepers, and the generation that it starts from, if any."""

    attempt: str
    keepers: list[list[Any]]  # by rank: that of its node, and that of another node, if there is one
    source: Source | None = None


@dataclass
class Copy:
    data: np.ndarray
    crc: int = -1
    told: Told = field(default_factory=dict)

    @property
    def sealed(self) -> bool:
        return bool(self.told)


class MemoryKeeper:
    def __init__(self) -> None:
        self._reserved: dict[int, int] = {}
        self._copies: dict[tuple[str, int], Copy] = {}  # by id and rank, in the order of their making
        self._unused: list[np.ndarray] = []  # fresh memory costs more than the copy

    def begin(self, id: str | None) -> None:
        """Begins an attempt: drops all copies but those of the generation that it starts from."""
        self._reserved, self._unused = {}, []
        self._copies = {key: copy for key, copy in self._copies.items() if key[0] == id}

    def reserve(self, rank: int, size: int) -> None:
        """Notes that a worker wants to keep copies of `size` bytes."""
        self._reserved[rank] = KEPT * size

    def need(self) -> int:
        """Computes the bytes that all copies take together."""
        return sum(self._reserved.values())

    def open(self, id: str, rank: int, size: int) -> None:
        """Begins a copy; drops the oldest generation if it begins another one."""
        ids = list(dict.fromkeys([*(of for of, _ in self._copies), id]))
        for key in [key for key in self._copies if key[0] not in ids[-KEPT:]]:
            self._unused.append(self._copies.pop(key).data)
        fits = next((i for i, data in enumerate(self._unused) if len(data) == size), None)
        self._copies[id, rank] = Copy(np.empty(size, np.uint8) if fits is None else self._unused.pop(fits))

    def write(self, id: str, rank: int, start: int, data: np.ndarray) -> None:
        self._copies[id, rank].data[start : start + len(data)] = data

    def seal(self, id: str, rank: int, crc: int, told: Told) -> None:
        """Completes a copy; ValueError if its bytes are not those that its worker had."""
        copy = self._copies[id, rank]
        if zlib.crc32(copy.data.data) != crc:
            del self._copies[id, rank]
            raise ValueError("a copy did not arrive as it was sent (CRC-32)")
        copy.crc, copy.told = crc, told

    def held(self) -> list[tuple[str, int, Told]]:
        """Lists the sealed copies: id, rank, and what is the same for all copies of a generation."""
        return [(id, rank, {key: copy.told[key] for key in ("step", "world", "common")})
                for (id, rank), copy in self._copies.items() if copy.sealed]  # fmt: skip

    def intact(self, id: str) -> list[int]:
        """Lists the ranks whose copies of a generation are still what was sealed."""
        return [rank for (of, rank), copy in self._copies.items()
                if of == id and copy.sealed and zlib.crc32(copy.data.data) == copy.crc]  # fmt: skip

    def told(self, id: str, ranks: list[int], keys: list[str]) -> list[Told]:
        return [{key: self._copies[id, rank].told[key] for key in keys} for rank in ranks]

    def read(self, id: str, rank: int, ranges: list[tuple[int, int]]) -> np.ndarray:
        """Reads byte ranges of a copy, one after another."""
        data = self._copies[id, rank].data
        return np.concatenate([data[start:stop] for start, stop in ranges])


def make(node: str, runtime_env: dict[str, Any]) -> Any:
    """Creates the keeper of a node."""
    there, actor = NodeAffinitySchedulingStrategy(node, soft=False), ray.remote(num_cpus=0)(MemoryKeeper)
    return actor.options(scheduling_strategy=there, runtime_env=runtime_env or None).remote()
