"""Counts what a sample has of duplicates, by the places that it was drawn by: what `estimates` tells those of the whole from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from heliostat.curation import spill
from heliostat.curation.comparing import counted
from heliostat.curation.flow import Flow, Task
from heliostat.curation.work import key
from heliostat.storage import Location

EXACT = "exact"  # in place of a stage's name, in what became of documents
Alike = tuple[dict[int, int], dict[int, int]]
"""Counts the documents that clusters have in one place, by their number, and clusters by their places; of two and more each."""


def alike_of(flow: Flow, output: Location, ends: list[list[str]], funnel: dict[str, dict[str, Any]]) -> dict[str, Alike]:
    """Counts what the stages that compare documents found alike in a sample, by the places that it was drawn by."""
    stages = [name for name, part in funnel.items() if "clusters" in part["counts"]] + [EXACT]
    told = {"output": output.uri, "paths": [path for _, path in ends], "stages": stages}
    (made,) = flow.all("alike", count_alike, iter([Task(key("alike", told), told)]))
    flow.forget("alike")
    return {name: ({int(k): n for k, n in groups.items()}, {int(k): n for k, n in places.items()})
            for name, (groups, places) in made["alike"].items()}  # fmt: skip


def count_alike(folder: Location, output: str, paths: list[str], stages: list[str]) -> dict[str, Any]:
    """Counts, of what each stage dropped for another document: documents of a cluster in one place by their number, and clusters
    by the number of their places, of two and more each."""
    found: dict[str, tuple[set[str], list[tuple[int, int]]]] = {name: (set(), []) for name in stages}
    for path in paths:
        for table in spill.read(Location(output), path):
            table = table.filter(pc.is_in(table["stage"], pa.array(stages)))
            for id, stage, reason, detail in zip(
                *(table[n].to_pylist() for n in ("id", "stage", "reason", "detail")), strict=True
            ):
                who = detail if reason == "duplicate" else detail.rpartition(" (")[0]  # others also say of how many, or how near
                firsts, pairs = found[stage]
                pairs += [_cluster_place(who, one) for one in ((id,) if who in firsts else (who, id))]
                firsts.add(who)
    return {"alike": {name: _counted(pairs) for name, (_, pairs) in found.items()}, "files": []}


def _cluster_place(who: str, id: str) -> tuple[int, int]:
    """Hashes a cluster by who stays of it, and the place that a document was drawn with: what its id has before its number."""
    return xxhash.xxh64_intdigest(who.encode()), xxhash.xxh64_intdigest((id.rpartition("#")[0] or id).encode())


def _counted(pairs: list[tuple[int, int]]) -> tuple[dict[str, int], dict[str, int]]:
    groups = Counter(pairs)
    places = Counter(cluster for cluster, _ in groups)
    return tuple(counted(n for n in counts.values() if n > 1) for counts in (groups, places))  # type: ignore[return-value]
