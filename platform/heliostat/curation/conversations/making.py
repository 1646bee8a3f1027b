"""Makes a dataset of conversations or preferences: groups documents by prompt, packs their tokens, and writes shards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from heliostat.curation.conversations import packing, reading, rendering, shapes
from heliostat.curation.conversations.reading import ConversationSource, unpacked_mask, unpacked_tokens
from heliostat.curation.conversations.rendering import Renderer
from heliostat.curation.engine import Curated
from heliostat.curation.making import WrittenShards
from heliostat.curation.segment import SpilledRun
from heliostat.curation.text import documents, gathering, tokens
from heliostat.curation.text.gathering import Together
from heliostat.curation.text.making import Reading
from heliostat.curation.text.tasks import bounds
from heliostat.data import manifest, row_groups, versions
from heliostat.data.conversations import FACT, PACKS, PREFERENCES, TEMPLATE, ConversationFacts
from heliostat.data.manifest import FILES, SHARDS
from heliostat.data.row_groups import ShardCollector
from heliostat.storage.locations import Location
from heliostat.tasks import libraries

VERSION = 1  # increase it when the same conversations give other rows
BY_PROMPT = Together(column=reading.PROMPT, order=reading.TEXT)
COUNTS = ("conversations", "tokens", "trained", "turns", "trained_ends", "untrained", "cut", "split", "trailing", "retokenized",
          "ended", "padding")  # fmt: skip


@dataclass(frozen=True)
class Sharding:
    """Configures the shards: their number, the approximate tokens per row group, and how rows are made of conversations."""

    output: str
    shards: int
    chunk_tokens: int
    sequence_length: int
    packs: bool  # whether the rows are packs, or preferences
    best_fit: bool
    every: int


@dataclass
class ConversationMaking(Reading):
    """Makes the dataset of one pipeline; the fields are the pipeline's keys."""

    meanings: ClassVar = documents.REASONS | reading.REASONS
    what_read: ClassVar = True

    source: ConversationSource
    renderer: Renderer
    chunk_tokens: int
    best_fit: bool

    @property
    def identity(self) -> list[object]:
        source = self.source
        return [source.input, {**vars(source.rules)}, self.renderer.dialect.digest, source.turns, source.end_of_turn,
                source.sequence_length, source.too_long, rendering.VERSION,
                reading.version(source.rules.shape, source.too_long, source.turns),
                libraries.versions(["tokenizers", "transformers", "jinja2"])]  # fmt: skip

    @property
    def explained(self) -> bool:
        return True

    @property
    def columns(self) -> list[str]:
        return [reading.COUNTS]

    @property
    def packs(self) -> bool:
        """Checks whether the rows are packs, or preferences."""
        return self.source.rules.shape not in shapes.PAIRS

    def write(self, curated: Curated) -> WrittenShards:
        came, dialect = curated.bytes, self.renderer.dialect
        facts = self.tokenizer_facts(dialect.definition, dialect.end_of_document)
        facts["files"][TEMPLATE] = versions.store(self.output, f"{FILES}/chat_template-", dialect.template.encode(), ".jinja")
        problem = "input: too many conversations have the same first message of the user"
        duplicates, ends = self.regrouped(curated, BY_PROMPT, problem, "or remove some of these conversations")
        shards, counts, totals = ShardCollector(), Counter[str](dict.fromkeys(COUNTS, 0)), Counter[str](documents=0, bytes=0)
        plan = Sharding(self.output.uri, self.count(curated), self.chunk_tokens, self.source.sequence_length, self.packs,
                        self.best_fit, self.every)  # fmt: skip
        for record in self.single_shards(curated, write_shard, plan, "conversations", VERSION):
            ends += record["ends"]
            for shard in record["shards"]:
                shards.add(shard)
                counts.update(shard["counts"])
                totals.update({name: shard[name] for name in totals})
        facts |= {"documents": totals["documents"], "bytes": totals["bytes"], "duplicates": duplicates, FACT: self._facts(counts)}
        part = {"documents": totals["documents"] + duplicates, "kept": totals["documents"], "kept_bytes": totals["bytes"],
                "bytes": came, "dropped": {"duplicate": duplicates} if duplicates else {}, "counts": dict(counts)}  # fmt: skip
        return WrittenShards(shards.rows(), facts, part, ends)

    def _facts(self, counts: Counter[str]) -> ConversationFacts:
        return {
            "form": "packs" if self.packs else "preferences",
            "sequence_length": self.source.sequence_length,
            "template": self.renderer.dialect.template_digest,
            "turns": self.source.turns,
            "end": self.renderer.end_id,
            "end_of_turn": self.source.end_of_turn,
            "counts": dict(counts),
            "reference": None,
        }


def write_shard(folder: Location, number: int, runs: list[SpilledRun], plan: Sharding) -> dict[str, Any]:
    """Writes a shard. Returns its counts and its rows of the manifest, or no shard for an empty range of hashes."""
    table = gathering.grouped(folder, runs, *bounds(number, plan.shards))
    if table is None:
        return {"shards": [], "ends": [], "files": []}
    columns = [json.loads(text) for text in table["columns"].to_pylist()]
    counts = Counter[str]()
    for column in columns:
        counts.update(column[reading.COUNTS])
    places = np.array([manifest.place(digest.hex()) for digest in table["group"].to_pylist()], np.int64)
    sizes = np.array([column[reading.COUNTS]["tokens"] for column in columns], np.int64)
    ids, groups, begin = table["id"].to_pylist(), list[pa.Table](), 0
    chunks = tokens.documents_in(sizes, plan.chunk_tokens, places)
    for count, _ in chunks:
        part = slice(begin, begin + count)
        groups.append(_packs(ids[part], columns[part], plan) if plan.packs else _preferences(ids[part], columns[part]))
        begin += count
    if plan.packs:
        counts["padding"] = sum(len(group) for group in groups) * plan.sequence_length - counts["tokens"]
    data, output = encoded(groups, [place for _, place in chunks]), Location(plan.output)
    path = versions.store(output, f"{SHARDS}/{number:05d}/", data, ".parquet")
    ends = gathering.spill_kept(folder, path, table, gathering.Duplicates(folder, False), plan.every)
    shard = {**row_groups.written(output, path, data, None), "documents": len(ids), "bytes": counts.pop("bytes"),
             "counts": dict(counts)}  # fmt: skip
    return {"shards": [shard], "ends": ends, "files": ends}


def _packs(ids: list[str], columns: list[dict[str, Any]], plan: Sharding) -> pa.Table:
    """Packs the conversations of a row group. Returns rows of PACKS."""
    rows = list[tuple[str, np.ndarray, np.ndarray]]()
    for id, column in zip(ids, columns, strict=True):
        for packed_tokens, packed_mask in column[reading.ROWS]:
            values = unpacked_tokens(packed_tokens)
            rows.append((id, values, unpacked_mask(packed_mask, len(values))))
    lengths = [len(values) for _, values, _ in rows]
    packs = packing.best_fit(lengths, plan.sequence_length) if plan.best_fit else [[number] for number in range(len(rows))]
    return pa.Table.from_pydict(
        {
            "ids": [[rows[number][0] for number in pack] for pack in packs],
            "lengths": [[lengths[number] for number in pack] for pack in packs],
            "tokens": [np.concatenate([rows[number][1] for number in pack]) for pack in packs],
            "trained": [np.concatenate([rows[number][2] for number in pack]) for pack in packs],
        },
        schema=PACKS,
    )


def _preferences(ids: list[str], columns: list[dict[str, Any]]) -> pa.Table:
    values = [[unpacked_tokens(text) for text in column[reading.ROWS][0]] for column in columns]
    return pa.Table.from_pydict(dict(zip(PREFERENCES.names, [ids, *zip(*values, strict=True)], strict=True)), schema=PREFERENCES)


def encoded(groups: list[pa.Table], places: list[int]) -> bytes:
    """Returns row groups as the bytes of a Parquet file. `places`: their hold-out positions."""
    content = hashlib.sha256()
    for group in groups:
        content.update(json.dumps(group.to_pylist()).encode())
    return row_groups.encoded(groups, content.hexdigest(), places)
