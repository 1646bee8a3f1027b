"""Defines and reads the record of how a curated dataset was made: the funnel (counts per stage), and the end of each document
(its shard, or the reason for dropping it).

A dataset whose pipeline has `stages` names these files in its manifest's metadata, under `curation`:

    funnel      files/funnel-....json: the counts of each stage, in order, from reading to shards
    ends        files/ends-....parquet, several: the end of each document (`END`), sorted by the hash of its id. The list has
                the first hash of each file, so finding one document needs only one file

If the pipeline's `columns` lists columns, the ends have a column `columns` with the values as JSON. The dataset's digest doesn't
cover the seconds of stages (`files/DIGEST-seconds.json`), which differ between runs. Nor does it cover the input's location
(`files/DIGEST-pipeline.json`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.curation import segment, tally
from heliostat.curation.recording import key_of
from heliostat.curation.segment import LEFT_OUT as END
from heliostat.curation.segment import packed
from heliostat.curation.stage import Stage
from heliostat.data import versions
from heliostat.data.manifest import FILES, UNCOVERED, Manifest
from heliostat.errors import MissingDataError
from heliostat.storage.locations import Location
from heliostat.tasks import care, spill

SECONDS, PIPELINE = UNCOVERED
END_ROWS = 200_000  # documents per file; the task that writes it takes 0.4 KB of memory per document
__all__ = ["END", "end_of", "ends", "funnel", "kept_as", "made_by", "seconds", "with_column"]


def funnel(dataset: Manifest) -> dict[str, dict[str, Any]]:
    """Reads the counts of each stage, by `NUMBER NAME`, in order, with `read` first and `shard` last.

    MissingDataError if the dataset was made without stages.

    Each stage has `documents` and `bytes` (its input), `kept` and `kept_bytes`, `dropped` by reason, `counts`, `histograms` (by
    measure: value -> [kept, dropped]), `sizes` (of clusters: documents -> number of clusters), `examples` (by rule: [hash, id,
    text, detail, measures], for images also a thumbnail), `thresholds` (by measure: values), `what` (by reason: its meaning),
    and `largest` (clusters: [documents, id of the kept one]). The entry `finish`, if it exists, has only `dropped`: the
    documents that the requirements for texts dropped after the stages.
    """
    return json.loads(dataset.location.join(_named(dataset)["funnel"]).read())


def seconds(dataset: Manifest) -> dict[str, float]:
    """Reads the CPU seconds of each stage, by `NUMBER NAME`; empty if the dataset doesn't record the seconds."""
    return dataset.uncovered(SECONDS)


def made_by(dataset: Manifest) -> dict[str, Any]:
    """Reads the keys `input`, `rules`, and `stages` of the pipeline that made the dataset; empty if the dataset doesn't record
    these keys."""
    return dataset.uncovered(PIPELINE)


def end_of(dataset: Manifest, id: str) -> list[dict[str, Any]]:
    """Finds the records of a document: its shard (`reason` is `kept`, and `detail` is the shard), or the reason for dropping it.
    Returns rows of END; no rows for an unknown id."""
    wanted = key_of(id)
    return [row for table in _tables(dataset, wanted, wanted + 1) for row in _rows(table) if row["id"] == id]


def kept_as(dataset: Manifest, digest: str) -> list[dict[str, Any]]:
    """Finds the records (rows of END) of documents whose text, after all stages, has this SHA-256 (hex). Reads the records of all
    documents."""
    return [row for table in ends(dataset) for row in _rows(table.filter(pc.equal(table["hash"], digest)))]


def with_column(dataset: Manifest, name: str, value: str) -> list[dict[str, Any]]:
    """Finds the records (rows of END) of documents that have this value in a column. Reads the records of all documents.
    MissingDataError if the dataset doesn't record the column."""
    part, rows = json.dumps(value), []
    for table in ends(dataset):
        if "columns" not in table.column_names:
            raise MissingDataError(
                f"{dataset.location}: the dataset doesn't keep the column {name!r} of its documents. Add "
                f"`columns: [{name}]` to the pipeline, and run `heliostat data prepare`"
            )
        near = _rows(table.filter(pc.match_substring(table["columns"].fill_null(""), part)))
        rows += [row for row in near if row["columns"].get(name) == value]
    return rows


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    return [{**r, "measures": json.loads(r["measures"] or "{}"), "columns": json.loads(r.get("columns") or "{}")}
            for r in table.to_pylist()]  # fmt: skip


def ends(dataset: Manifest) -> Iterator[pa.Table]:
    """Yields tables of END: a row per document with its shard, or the reason for dropping it."""
    yield from _tables(dataset, 0, spill.ALL)


def _tables(dataset: Manifest, low: int, high: int) -> Iterator[pa.Table]:
    for begin, end, path in _listed(dataset):
        if begin < high and end > low:
            yield from spill.read(dataset.location, path, low, high)


def _listed(dataset: Manifest) -> Iterator[tuple[int, int, str]]:
    """Yields (first hash, hash after the last hash, path) of each file of END rows."""
    listed = _named(dataset)["ends"]
    for (begin, path), (end, _) in zip(listed, [*listed[1:], [f"{spill.ALL:x}", ""]], strict=True):
        yield int(begin, 16), int(end, 16), path


def _named(dataset: Manifest) -> dict[str, Any]:
    if "curation" not in dataset.meta:
        raise MissingDataError(
            f"{dataset.location}: the dataset doesn't record which documents were dropped, because its pipeline has no `stages`. "
            "Add `stages`, and run `heliostat data prepare`. The dataset's quarantine.parquet lists unreadable documents"
        )
    return dataset.meta["curation"]


# writing -------------------------------------------------------------------------------------------------------------


def parts(rows: int) -> int:
    return max(1, -(-rows // END_ROWS))


def write_ends(folder: Location, part: int, parts: int, names: list[str], output: str, columns: list[str]) -> dict[str, object]:
    """Writes one file of END rows, in a task: the rows whose key is in key range `part` of `parts`. `columns`: the documents'
    columns to include. Returns the range's first key, and the file's path."""
    low, high = spill.share(part, parts)
    table = spill.joined(folder, names, low, high, END)
    place = table.schema.get_field_index("columns")
    kept = table.remove_column(place)
    if columns:
        chosen = [_chosen(packed_columns, columns) for packed_columns in table["columns"].to_pylist()]
        kept = kept.append_column(END.field("columns"), pa.array(chosen, pa.large_string()))
    return {"begin": f"{low:x}", "path": store_ends(Location(output), kept)}


def store_ends(output: Location, table: pa.Table) -> str:
    return versions.store(output, f"{FILES}/ends-", spill.encode(table, ("id", "stage", "reason", "detail")), ".parquet")


def rewritten(dataset: Manifest, ids: set[str], end: dict[str, str], output: Location) -> list[list[str]]:
    """Rewrites the END rows of these documents, so that only the id and the fields of `end` remain.

    Returns [first hash, path] for all files of END rows. Files without these documents aren't rewritten.
    """
    files, keys = list[list[str]](), sorted(key_of(id) for id in ids)
    for begin, stop, path in _listed(dataset):
        if any(begin <= key < stop for key in keys):
            table = pa.concat_tables(spill.read(dataset.location, path))
            empty = dict.fromkeys(table.column_names)
            rows = [{**empty, "key": r["key"], "id": r["id"], **end} if r["id"] in ids else r for r in table.to_pylist()]
            path = store_ends(output, pa.Table.from_pylist(rows, table.schema))
        files.append([f"{begin:x}", path])
    return files


def _chosen(packed_columns: str | None, columns: list[str]) -> str | None:
    values = json.loads(packed_columns) if packed_columns else {}
    return packed({name: values[name] for name in columns if values.get(name) is not None})


def explained(stages: list[Stage], total: tally.Tally, shard: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Combines the counts of reading, of the stages (in their order), and of the shards into one funnel, without seconds."""
    entries = {segment.READ: tally.entry(total, segment.READ)}
    for number, stage in enumerate(stages):
        limits = {m: [v for f in fields if (v := getattr(stage, f, None)) is not None] for m, fields in stage.thresholds.items()}
        name = tally.label(number, stage)
        entries[name] = tally.entry(total, name) | {"thresholds": limits, "what": stage.reasons}
        if care.CRASHED in entries[name]["dropped"]:
            entries[name]["what"] = stage.reasons | {care.CRASHED: care.MEANING}
    entries |= {segment.FINISH: total[segment.FINISH]} if segment.FINISH in total else {}
    entries["shard"] = tally.entry({}, "") | shard
    return {name: {k: v for k, v in part.items() if k != "seconds"} for name, part in entries.items()}
