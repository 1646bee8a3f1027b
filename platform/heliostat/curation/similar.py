"""Counts what a sample has of duplicates, by the places that it was drawn by: what `estimates` tells those of the whole from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from heliostat.curation.comparing import counted
from heliostat.curation.sampled import SampledParts
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key

ROWS = 100_000  # documents of which a task counts those that were dropped: some 500 bytes of memory each
EXACT = "exact"  # in place of a stage's name, in what became of documents
Alike = tuple[dict[int, int], dict[int, int]]
"""Counts the documents that clusters have in one place, by their number, and clusters by their places; of two and more each."""


def alike_of(
    flow: Flow, output: Location, ends: list[list[str]], funnel: dict[str, dict[str, Any]], sample: SampledParts
) -> dict[str, Alike]:
    """Counts what the stages that compare documents found alike in a sample, by the places that it was drawn by."""
    compared = [name for name, part in funnel.items() if "clusters" in part["counts"]]
    stages, parts = [*compared, EXACT], max(1, sum(funnel[name]["documents"] for name in [*compared, "shard"]) // ROWS)
    told = {"output": output.uri, "paths": [path for _, path in ends], "stages": stages}
    follows, shared = key(told, sample.places), {"places": flow.share(sample.places)}
    work = (Task(key(follows, part, parts), {"part": part, "parts": parts, **told}, shared) for part in range(parts))
    made = [record["alike"] for record in flow.all("alike", count_alike, work)]
    flow.forget("alike")
    return {name: (_summed(one[name][0] for one in made), _summed(one[name][1] for one in made)) for name in stages}


def _summed(counts: Iterable[dict[str, int]]) -> dict[int, int]:
    total = sum((Counter(some) for some in counts), Counter[str]())
    return {int(size): number for size, number in total.items()}


def count_alike(folder: Location, part: int, parts: int, output: str, paths: list[str], stages: list[str],
                places: list[str]) -> dict[str, Any]:  # fmt: skip
    """Counts, of what each stage dropped for another document, in a part of all clusters: documents of a cluster in one place by
    their number, and clusters by the number of their places, of two and more each."""
    found: dict[str, tuple[set[int], list[tuple[int, int]]]] = {name: (set(), []) for name in stages}
    drawn = set(places)
    for path in paths:
        for table in spill.read(Location(output), path):
            table = table.filter(pc.is_in(table["stage"], pa.array(stages)))
            columns = (table[name].to_pylist() for name in ("id", "stage", "reason", "detail"))
            for id, stage, reason, detail in zip(*columns, strict=True):
                who = detail if reason == "duplicate" else detail.rpartition(" (")[0]  # others also say of how many
                if (cluster := _hash(who)) % parts == part:
                    firsts, pairs = found[stage]
                    pairs += [(cluster, _hash(place_of(one, drawn))) for one in ((id,) if cluster in firsts else (who, id))]
                    firsts.add(cluster)
    return {"alike": {name: _counted(pairs) for name, (_, pairs) in found.items()}, "files": []}


def place_of(id: str, drawn: set[str]) -> str:
    """Finds the place that a document was drawn with: one of those with many documents that its id begins with, or itself."""
    ends = (at for at, letter in enumerate(id) if letter in "#/")
    return next((id[:at] for at in ends if id[:at] in drawn), id)


def _hash(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode())


def _counted(pairs: list[tuple[int, int]]) -> tuple[dict[str, int], dict[str, int]]:
    groups = Counter(pairs)
    places = Counter(cluster for cluster, _ in groups)
    return counted(n for n in groups.values() if n > 1), counted(n for n in places.values() if n > 1)
