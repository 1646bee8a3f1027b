"""Writes what a dataset with stages says about its making (`reasons`): the funnel, and what became of each document."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from heliostat.curation import reasons, segment, tally
from heliostat.curation.engine import segments, summed
from heliostat.curation.stage import Stage
from heliostat.data import versions
from heliostat.data.manifest import FILES
from heliostat.storage.locations import Location
from heliostat.tasks.exchange import by_parts
from heliostat.tasks.flow import Flow


@dataclass(frozen=True)
class Explained:
    """Holds what the stages did, the CPU seconds of each, and what the manifest says of both."""

    total: tally.Tally
    seconds: dict[str, float]
    meta: dict[str, Any]


def explain(flow: Flow, stages: list[Stage], tallies: list[str], shard: dict[str, Any], ends: list[str], rows: int,
            columns: list[str], output: Location, what: dict[str, str] | None = None) -> Explained:  # fmt: skip
    """Writes the record of `rows` documents, of spills of their `ends`; `shard` is the funnel's part of what is in shards.

    `what` says what the reasons mean for which reading leaves something out.
    """
    total = summed(flow, sorted(tallies))
    told = reasons.explained(stages, total, shard)
    for name in (segment.READ, segment.FINISH) if what else ():
        told |= {name: told[name] | {"what": what}} if name in told else {}
    funnel = json.dumps({name: json.loads(json.dumps(told[name], sort_keys=True)) for name in told}).encode()
    work = by_parts(flow, "ends", reasons.parts(rows), ends, output=output.uri, columns=columns)
    written = flow.all("ends", reasons.write_ends, work, valid=lambda r: output.join(r["path"]).exists())
    path = versions.store(output, f"{FILES}/funnel-", funnel, ".json")
    listed = [[r["begin"], r["path"]] for r in written]
    meta = {"curation": {"funnel": path, "ends": listed}, "also": sorted({path, *(p for _, p in listed)})}
    return Explained(total, _seconds(flow, stages, total), meta)


def _seconds(flow: Flow, stages: list[Stage], total: tally.Tally) -> dict[str, float]:
    of_stages = {name: round(total[name]["seconds"], 3) for name in total if name not in (segment.READ, segment.FINISH)}
    first = sum(of_stages.get(tally.label(number, stage), 0.0) for number, stage in segments(stages)[0])
    return {segment.READ: round(max(0.0, flow.seconds.get("read", 0.0) - first), 3), **of_stages,
            "shard": round(flow.seconds.get("shards", 0.0), 3)}  # fmt: skip
