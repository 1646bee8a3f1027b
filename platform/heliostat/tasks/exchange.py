"""Hands spills to tasks that read a range of keys each, merged first where every task would read a little of very many.

Tasks that compare documents make a spill each, and those behind them read their range of keys out of every spill: of both there
are as many as the input has parts, so that reads grow with its square. Above MANY of them, wider ranges are merged first, as many
as the root of the number of ranges, each out of so many spills as have one task's rows in it. What is opened then grows with the
power of 1.5, for one more pass over the spills; no task holds more than without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import isqrt
from types import MappingProxyType

import pyarrow as pa

from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key

MANY = 1 << 16  # ranges of spills: so many cost about a minute of a CPU, or 3 cents of a store's requests


def exchanged(flow: Flow, kind: str, names: list[str], ranges: list[tuple[int, int]]) -> Iterator[tuple[str, object]]:
    """Yields for each of the ascending ranges of keys what its task is to read: what that follows from, and the spills' names,
    shared."""
    for some, count in _merged(flow, kind, names, ranges):
        told = key(some), flow.share(some)
        yield from (told for _ in range(count))


def by_parts(flow: Flow, kind: str, parts: int, names: list[str], beside: Mapping[str, list[str]] = MappingProxyType({}),
             **more: object) -> Iterator[Task]:  # fmt: skip
    """Describes one task for each part of all keys, over spills; `beside`: other spills that it reads, by the argument's name."""
    spills, ranges = {"names": names, **beside}, [spill.share(part, parts) for part in range(parts)]
    given = [exchanged(flow, kind, some, ranges) for some in spills.values()]
    for part, told in enumerate(zip(*given, strict=True)):
        shared = dict(zip(spills, (names for _, names in told), strict=True))
        follows = [follows for follows, _ in told]
        yield Task(key(follows, part, parts, more), {"part": part, "parts": parts, **more}, shared)


def _merged(flow: Flow, kind: str, names: list[str], ranges: list[tuple[int, int]]) -> list[tuple[list[str], int]]:
    """Returns the spills of some ranges, and how many ranges these are, for all of them in turn."""
    count, wide = len(ranges), isqrt(len(ranges))
    size = len(names) * wide // max(1, count)
    if len(names) * count <= MANY or size < 2:
        return [(names, count)]
    edges = list(pairwise(count * at // wide for at in range(wide + 1)))
    groups = [names[at : at + size] for at in range(0, len(names), size)]

    def work() -> Iterator[Task]:
        for start, stop in edges:
            told = {"low": ranges[start][0], "high": ranges[stop - 1][1]}
            yield from (Task(key("merge", group, told), {"names": group, **told}) for group in groups)

    made = [record["merged"] for record in flow.all(f"{kind}-merge", merge, work())]
    parts = (made[at : at + len(groups)] for at in range(0, len(made), len(groups)))
    return [([name for name in part if name], stop - start) for part, (start, stop) in zip(parts, edges, strict=True)]


def merge(folder: Location, names: list[str], low: int, high: int) -> dict[str, object]:
    """Spills what some spills have of a range of keys as one, if they have anything."""
    held = [table for name in names for table in spill.read(folder, name, low, high)]
    if not held:
        return {"merged": None, "files": []}
    name = spill.write(folder, pa.concat_tables(held))
    return {"merged": name, "files": [name]}
