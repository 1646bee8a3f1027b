"""Makes a dataset of pairs. Reads and curates documents like a text pipeline, trains a tokenizer if the pipeline configures one,
and writes the shards."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.curation.engine import Curated
from heliostat.curation.making import WrittenShards
from heliostat.curation.pairs import extracting, reading
from heliostat.curation.pairs.reading import KIND, QUERY, PairSource
from heliostat.curation.segment import SpilledRun
from heliostat.curation.text import documents, tokens
from heliostat.curation.text.making import Reading, identities
from heliostat.curation.text.tasks import bounds
from heliostat.data import manifest, row_groups, versions
from heliostat.data.manifest import PLACES_KEY, SHARDS
from heliostat.data.row_groups import ShardCollector
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Task
from heliostat.tasks.spill import survivors_of
from heliostat.tasks.work import key

SCHEMA = pa.schema([("id", pa.string()), ("kind", pa.string()), ("query", pa.large_string()), ("text", pa.large_string())])
FORM: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True, "write_statistics": False}
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
            facts = self.tokenizer_facts(self.definition(curated), self.tokenizer["end_of_document"])
        shards, kinds, totals = ShardCollector(), Counter[str](), Counter[str](documents=0, duplicates=0, bytes=0)
        for record in self._shards(curated):
            for shard in record["shards"]:
                shards.add(shard)
                kinds.update(shard["kinds"])
                totals.update({name: shard[name] for name in totals})
        facts |= {**totals, "kinds": dict(sorted(kinds.items()))}
        return WrittenShards(shards.rows(), facts)

    def _shards(self, curated: Curated) -> Iterator[dict[str, Any]]:
        plan = PairSharding(self.output.uri, max(1, round(curated.bytes / self.shard_bytes)), self.chunk_pairs)
        each, shared, ranges = curated.bytes // plan.shards, self.flow.share(plan), self.ranges(curated.runs, plan.shards)

        def work() -> Iterator[Task]:
            for part in ranges:
                follows = key("pairs", identities(part.runs), vars(plan))
                shared_run = {"runs": self.flow.share(part.runs), "plan": shared}
                for n in range(part.first, part.stop):
                    yield Task(key(follows, n), {"first": n, "stop": n + 1}, shared_run, each)

        return self.shards(write_shards, work())


def write_shards(folder: Location, first: int, stop: int, runs: list[SpilledRun], plan: PairSharding) -> dict[str, object]:
    """Writes shards one after another. Returns the shards' counts and their rows of the manifest."""
    records = [one for number in range(first, stop) if (one := _write_shard(folder, runs, number, plan)) is not None]
    return {"shards": records, "files": []}


def _write_shard(folder: Location, runs: list[SpilledRun], number: int, plan: PairSharding) -> dict[str, object] | None:
    low, high = bounds(number, plan.shards)
    survived = [row for t in survivors_of(folder, runs, low, high, ["hash", "id", "columns", "text"])
             for row in t.to_pylist()]  # fmt: skip
    if not survived:
        return None
    rows = unique([{**row, **json.loads(row["columns"])} for row in survived])
    data, output = encoded(rows, plan.chunk_pairs), Location(plan.output)
    path = versions.store(output, f"{SHARDS}/{number:05d}/", data, ".parquet")
    kinds, size = Counter(row[KIND] for row in rows), sum(len(row["text"].encode()) for row in rows)
    return {**row_groups.written(output, path, data, None), "documents": len(rows), "duplicates": len(survived) - len(rows),
            "kinds": dict(kinds), "bytes": size}  # fmt: skip


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
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    sink, begin = pa.BufferOutputStream(), 0
    with pq.ParquetWriter(sink, SCHEMA, **FORM) as writer:
        for counts, _ in groups:
            writer.write_table(table.slice(begin, sum(counts)), row_group_size=sum(counts))
            begin += sum(counts)
        # the manifest hashes the footer, so a changed pair changes the dataset's digest
        content = hashlib.sha256(json.dumps([[row[name] for name in SCHEMA.names] for row in rows]).encode()).hexdigest()
        writer.add_key_value_metadata({"content": content, PLACES_KEY.decode(): json.dumps([place for _, place in groups])})
    return sink.getvalue().to_pybytes()
