"""Defines what a curated dataset says about its making, and reads it: the funnel, and a reason for every document.

A dataset whose pipeline has `stages` names these files in its manifest's metadata, under `curation`:

    funnel      files/funnel-....json: what each stage did, in order, from reading to shards
    ends        files/ends-....parquet, several: what became of each document (`END`), sorted by the hash of its id, so that one
                is found without reading the others: the list says which hashes each file begins with

The seconds that stages took are not the same in every run, so they are in `files/DIGEST-seconds.json`, which no digest covers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.curation import segment, spill, tally
from heliostat.curation.segment import LEFT_OUT as END
from heliostat.curation.segment import key_of
from heliostat.curation.stage import Stage
from heliostat.data import versions
from heliostat.data.manifest import FILES, UNCOVERED, Manifest, kept_path
from heliostat.errors import DataError
from heliostat.storage import Location

(SECONDS,) = UNCOVERED
END_ROWS = 500_000  # of a file
__all__ = ["END", "end_of", "ends", "funnel", "kept_as", "seconds"]


def funnel(made: Manifest) -> dict[str, dict[str, Any]]:
    """Reads what each stage did, by `NUMBER NAME`, in order, with `read` first and `shard` last (DataError: made without stages).

    Of each: `documents` and `bytes` that came, `kept` and `kept_bytes`, `dropped` by reason, `counts`, `histograms` (of each
    measure: value -> [kept, dropped]), `examples` (of each rule: [hash, id, text, detail, measures]), `thresholds` (of each
    measure: values), `what` (of each reason: what it means), and `largest` (clusters: [documents, id that stayed]). `finish`, if
    there: what was asked of texts after the stages, `dropped` alone.
    """
    return json.loads(made.location.join(_named(made)["funnel"]).read())


def seconds(made: Manifest) -> dict[str, float]:
    """Reads the CPU seconds of each stage, by the funnel's names; empty where they are not known."""
    try:
        return json.loads(made.location.join(kept_path(made.digest, SECONDS)).read())
    except FileNotFoundError:
        return {}


def end_of(made: Manifest, id: str) -> list[dict[str, Any]]:
    """Finds what became of a document: rows of END, whose `detail` is its shard if `reason` is `kept`; none if no id is this."""
    wanted = key_of(id)
    found = (row for table in _tables(made, wanted, wanted + 1) for row in table.to_pylist())
    return [{**row, "measures": json.loads(row["measures"] or "{}")} for row in found if row["id"] == id]


def kept_as(made: Manifest, digest: str) -> list[dict[str, Any]]:
    """Finds what became of documents whose text, after all stages, has this SHA-256 (hex); reads all ends."""
    return [row for table in ends(made) for row in table.filter(pc.equal(table["hash"], digest)).to_pylist()]


def ends(made: Manifest) -> Iterator[pa.Table]:
    """Yields what became of all documents, as tables of END."""
    yield from _tables(made, 0, spill.ALL)


def _tables(made: Manifest, low: int, high: int) -> Iterator[pa.Table]:
    listed = _named(made)["ends"]
    for (begin, path), (end, _) in zip(listed, [*listed[1:], [f"{spill.ALL:x}", ""]], strict=True):
        if int(begin, 16) < high and int(end, 16) > low:
            yield from spill.read(made.location, path, low, high)


def _named(made: Manifest) -> dict[str, Any]:
    if "curation" not in made.meta:
        raise DataError(f"{made.location}: was made without stages, so it holds no reasons; see its quarantine.parquet")
    return made.meta["curation"]


# writing -------------------------------------------------------------------------------------------------------------


def parts(rows: int) -> int:
    """Chooses in how many files so many ends are written."""
    return max(1, -(-rows // END_ROWS))


def write_ends(folder: Location, part: int, parts: int, names: list[str], output: str) -> dict[str, Any]:
    """Writes one file of ends, in a task: those of one part of all keys."""
    low, high = spill.share(part, parts)
    tables = [t for name in names for t in spill.read(folder, name, low, high)]
    data = spill.encode(pa.concat_tables([END.empty_table(), *tables]), ("id", "stage", "reason", "detail"))
    return {"begin": f"{low:x}", "path": versions.store(Location(output), f"{FILES}/ends-", data, ".parquet")}


def explained(stages: list[Stage], total: tally.Tally, shard: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Puts the funnel together: what reading, the stages in their order, and the shards did, without seconds."""
    told = {segment.READ: tally.entry(total, segment.READ)}
    for number, stage in enumerate(stages):
        limits = {m: [v for f in fields if (v := getattr(stage, f, None)) is not None] for m, fields in stage.thresholds.items()}
        name = tally.label(number, stage)
        told[name] = tally.entry(total, name) | {"thresholds": limits, "what": stage.reasons}
    told |= {segment.FINISH: total[segment.FINISH]} if segment.FINISH in total else {}
    told["shard"] = tally.entry({}, "") | shard
    return {name: {k: v for k, v in part.items() if k != "seconds"} for name, part in told.items()}
