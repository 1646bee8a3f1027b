"""Runs the text pipeline's tasks in Ray's workers: read, measure, sample, assign to shards, write. Tables in, tables out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from heliostat.data import manifest, versions
from heliostat.data import shard as shard_file
from heliostat.data.manifest import FILES, SHARDS
from heliostat.pipelines.text import documents, sources, tokens
from heliostat.storage import Location

# one row per document, or (with a reason and no text) per dropped document
ROWS = pa.schema([("hash", pa.string()), ("id", pa.string()), ("text", pa.large_string()), ("reason", pa.string()),
                  ("detail", pa.string())])  # fmt: skip
DROPPED = -1  # the "shard" of documents that are dropped
PREFIXES = 1 << 16  # the hash's first 16 bits, in which the tokenizer's sample is measured
BLOCK_BYTES = 32 << 20  # of text, per block that a read task yields


def extract(batch: pa.Table, input: str, rules: documents.Rules) -> Iterator[pa.Table]:
    """Extracts the documents of the files that the batch names, as tables of ROWS."""
    base = sources.root(input)
    found: list[dict[str, Any]] = []
    size = 0
    for path in (p for paths in batch["paths"].to_pylist() for p in paths):
        for item in read_file(base, path, rules):
            if isinstance(item, documents.Dropped):
                found.append({"hash": "", "id": item.id, "text": None, "reason": item.reason, "detail": item.detail})
            else:
                found.append({"hash": item.hash, "id": item.id, "text": item.text, "reason": None})
                size += len(item.text)
            if size >= BLOCK_BYTES or len(found) >= 100_000:
                yield pa.Table.from_pylist(found, ROWS)
                found, size = [], 0
    yield pa.Table.from_pylist(found, ROWS)


def read_file(base: Location, path: str, rules: documents.Rules) -> Iterator[documents.Document | documents.Dropped]:
    """Reads a file's documents, or the reason why it is left out; a store that refuses or fails is an error."""
    try:
        data = sources.fetch(base, path, rules.max_file_bytes)
    except sources.LeftOutError as e:
        yield documents.Dropped(path or base.name, e.reason, e.detail)
        return
    yield from documents.read(path or base.name, data, rules)


def prefixes(table: pa.Table) -> np.ndarray:
    return np.array([int(h[:4], 16) for h in table["hash"].to_pylist()], np.int64)


def kept(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_null(table["reason"]))


def prefix_sizes(table: pa.Table) -> pa.Table:
    """Measures the UTF-8 bytes of text per hash prefix, as one row."""
    table = kept(table)
    lengths = pc.binary_length(table["text"]).to_numpy()
    sizes = np.bincount(prefixes(table), weights=lengths, minlength=PREFIXES).astype(np.int64)
    return pa.table({"sizes": [sizes.tobytes()]})


def lowest(table: pa.Table, limit: int) -> pa.Table:
    """Selects the documents whose hash prefix is at most `limit`."""
    table = kept(table)
    return table.filter(pa.array(prefixes(table) <= limit)).select(["hash", "id", "text"])


@ray.remote
def train_on(config: dict[str, Any], *tables: pa.Table) -> str:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing else runs meanwhile
    table, _ = unique(pa.concat_tables(t.cast(pa.schema(list(ROWS)[:3])) for t in tables))
    sizes = np.cumsum(pc.binary_length(table["text"]).to_numpy())
    table = table.slice(0, int(np.searchsorted(sizes, config["train_bytes"])) + 1)
    texts = (text.as_py() for text in table["text"])
    return tokens.train(texts, config["vocab_size"], config["end_of_document"])


def assign(table: pa.Table, shards: int) -> pa.Table:
    """Adds a column `shard`, from the hash of the text alone: a shard holds a range of hashes, and so do its chunks."""
    chosen = [int(h[:13], 16) * shards >> 52 if h else DROPPED for h in table["hash"].to_pylist()]
    return table.append_column("shard", pa.array(chosen, pa.int64()))


def unique(table: pa.Table) -> tuple[pa.Table, int]:
    """Sorts the table by hash and keeps each hash once, with the smallest id; also counts the rows that this removes."""
    table = table.sort_by([("hash", "ascending"), ("id", "ascending")])
    hashes = table["hash"].to_numpy()
    first = np.concatenate([[True], hashes[1:] != hashes[:-1]]) if len(hashes) else np.zeros(0, bool)
    return table.filter(pa.array(first, pa.bool_())), int(len(first) - first.sum())


def write_group(table: pa.Table, output: str, definition: Any, end: int, chunk_tokens: int) -> pa.Table:
    """Writes one shard and returns its counts, or writes the list of the dropped documents and counts them."""
    row: dict[str, Any] = dict.fromkeys(("documents", "duplicates", "bytes", "cut"), 0)
    row |= {"path": "", "counts": b"", "dropped": "{}", "examples": "{}", "listed": "", "contents": "[]"}
    shard = table["shard"][0].as_py()
    if shard == DROPPED:
        by_reason: dict[str, list[str]] = {}
        for id, reason in zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True):
            by_reason.setdefault(reason, []).append(id)
        listed = table.select(["id", "reason", "detail"]).sort_by([("reason", "ascending"), ("id", "ascending")])
        sink = pa.BufferOutputStream()
        pq.write_table(listed, sink, compression="zstd")
        row["listed"] = versions.store(Location(output), f"{FILES}/listed-", sink.getvalue().to_pybytes(), ".parquet")
        row["dropped"] = json.dumps({reason: len(ids) for reason, ids in by_reason.items()})
        row["examples"] = json.dumps({reason: sorted(ids)[:3] for reason, ids in by_reason.items()})
        return pa.Table.from_pylist([row])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray runs as many of these as there are processors
    tokenizer = tokens.load(ray.get(definition))
    table, duplicates = unique(table)
    encoded = tokens.encode(tokenizer, table["text"].to_pylist(), end)
    places = np.array([manifest.place(h) for h in table["hash"].to_pylist()], np.int64)
    data = tokens.shard(table["id"].to_pylist(), encoded, chunk_tokens, places)
    path = versions.store(Location(output), f"{SHARDS}/{shard:05d}/", data, ".parquet")
    row["contents"] = json.dumps(shard_file.content_digests(data, "tokens"))
    counts = np.bincount(np.concatenate(encoded), minlength=tokenizer.get_vocab_size()).astype(np.int64)
    row |= {"path": path, "documents": len(encoded), "duplicates": duplicates, "counts": counts.tobytes()}
    groups = tokens.chunks(np.array([len(e) for e in encoded]), chunk_tokens, places)
    row["cut"] = sum(len(rows) for rows, _ in groups) - len(encoded)
    row["bytes"] = int(pc.binary_length(table["text"]).to_numpy().sum())
    return pa.Table.from_pylist([row])


def footer(row: dict[str, Any], output: str) -> list[dict[str, Any]]:
    found = manifest.read_footer(Location(output), row["path"], "tokens")
    return [{**chunk, "content": content} for chunk, content in zip(found, json.loads(row["contents"]), strict=True)]
