"""Makes a dataset of pairs. Reads and curates documents like a text pipeline, trains a tokenizer if the pipeline configures one,
and writes the shards."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from heliostat.curation.engine import Curated
from heliostat.curation.making import WrittenShards
from heliostat.curation.pairs import extracting, reading
from heliostat.curation.pairs.reading import KIND, QUERY, PairSource
from heliostat.curation.segment import SpilledRun
from heliostat.curation.text import documents, tokens
from heliostat.curation.text.making import Reading
from heliostat.curation.text.tasks import bounds
from heliostat.data import manifest, row_groups, versions
from heliostat.data.manifest import SHARDS
from heliostat.data.row_groups import ShardCollector
from heliostat.storage.locations import Location
from heliostat.tasks.spill import survivors_of

SCHEMA = pa.schema([("id", pa.string()), ("kind", pa.string()), ("query", pa.large_string()), ("text", pa.large_string())])
Row = dict[str, Any]


@dataclass(frozen=True)
class PairSharding:
    """Configures the shards of a pairs dataset: their number, and the approximate pairs per row group."""

    output: str
    shards: int
    chunk_pairs: int


@dataclass
class PairMaking(Reading):
    """Makes the dataset of one pipeline; the fields are the pipeline's keys."""

    meanings: ClassVar = documents.REASONS | reading.REASONS
    recorded: ClassVar = False

    source: PairSource
    chunk_pairs: int

    @property
    def identity(self) -> list[object]:
        source = self.source
        return [source.input, vars(source.rules), source.query_column, vars(source.least), extracting.VERSION]

    def write(self, curated: Curated) -> WrittenShards:
        facts: dict[str, Any] = {}
        if self.tokenizer:
            facts = self.tokenizer_facts(self.definition(curated)(), self.tokenizer["end_of_document"])
        shards, kinds, totals = ShardCollector(), Counter[str](), Counter[str](documents=0, duplicates=0, bytes=0)
        plan = PairSharding(self.output.uri, self.count(curated), self.chunk_pairs)
        for record in self.single_shards(curated, write_shard, plan, "pairs"):
            for shard in record["shards"]:
                shards.add(shard)
                kinds.update(shard["kinds"])
                totals.update({name: shard[name] for name in totals})
        facts |= {**totals, "kinds": dict(sorted(kinds.items()))}
        return WrittenShards(shards.rows(), facts)


def write_shard(folder: Location, number: int, runs: list[SpilledRun], plan: PairSharding) -> dict[str, object]:
    """Writes a shard. Returns its counts and its rows of the manifest, or no shard for an empty range of hashes."""
    low, high = bounds(number, plan.shards)
    survived = [row for t in survivors_of(folder, runs, low, high, ["hash", "id", "columns", "text"])
             for row in t.to_pylist()]  # fmt: skip
    if not survived:
        return {"shards": [], "files": []}
    rows = unique([{**row, **json.loads(row["columns"])} for row in survived])
    data, output = encoded(rows, plan.chunk_pairs), Location(plan.output)
    path = versions.store(output, f"{SHARDS}/{number:05d}/", data, ".parquet")
    kinds, size = Counter(row[KIND] for row in rows), sum(len(row["text"].encode()) for row in rows)
    shard = {**row_groups.written(output, path, data, None), "documents": len(rows), "duplicates": len(survived) - len(rows),
             "kinds": dict(kinds), "bytes": size}  # fmt: skip
    return {"shards": [shard], "files": []}


def unique(rows: list[Row]) -> list[Row]:
    """Sorts pairs by the hashes of their texts. Of equal pairs, keeps the pair with the smallest id."""
    ordered = sorted(rows, key=lambda row: (row["hash"], row[QUERY], row["id"]))
    return [next(same) for _, same in itertools.groupby(ordered, key=lambda row: (row["hash"], row[QUERY]))]


def encoded(rows: list[Row], chunk_pairs: int) -> bytes:
    """Returns sorted pairs as the bytes of a Parquet file. The pairs of a text are in one row group, or in row groups that are
    held out together."""
    texts = [(hash, sum(1 for _ in same)) for hash, same in itertools.groupby(row["hash"] for row in rows)]
    places = np.array([manifest.place(hash.hex()) for hash, _ in texts], np.int64)
    groups = tokens.chunks(np.array([count for _, count in texts]), chunk_pairs, places)
    ends = list(itertools.accumulate(sum(counts) for counts, _ in groups))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    content = hashlib.sha256(json.dumps([[row[name] for name in SCHEMA.names] for row in rows]).encode()).hexdigest()
    parts = [table.slice(begin, end - begin) for begin, end in itertools.pairwise([0, *ends])]
    return row_groups.encoded(parts, content, [place for _, place in groups])
