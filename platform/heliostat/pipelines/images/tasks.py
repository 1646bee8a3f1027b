"""Runs the image pipeline's tasks in Ray's workers: read and prepare, assign to shards, write. Tables in, tables out."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from heliostat.data import manifest, versions
from heliostat.data import shard as shard_file
from heliostat.data.manifest import FILES, SHARDS
from heliostat.pipelines.images import pictures, sources
from heliostat.pipelines.images.pictures import Dropped, Rules
from heliostat.pipelines.images.sources import Columns, Limits
from heliostat.storage import Location

# one row per image, or (with a reason and no image) per dropped image
ROWS = pa.schema(
    [("hash", pa.string()), ("id", pa.string()), ("looks", pa.int64()), ("width", pa.int32()), ("height", pa.int32()),
     ("image", pa.large_binary()), ("caption", pa.string()), ("label", pa.string()), ("reason", pa.string()),
     ("detail", pa.string())]
)  # fmt: skip
STORED = ("id", "caption", "label", "width", "height", "image", "latent", "embedding")  # of a shard: those that there are
USUAL = Limits()
BLOCK_BYTES = 32 << 20  # of images, per block that a read task yields


def extract(batch: pa.Table, input: str, columns: Columns, rules: Rules, limits: Limits = USUAL) -> Iterator[pa.Table]:
    """Extracts the images of the tasks in the batch, as tables of ROWS."""
    found: list[dict[str, Any]] = []
    size = 0
    for task in map(json.loads, batch["task"].to_pylist()):
        for raw in sources.read(input, task, columns, limits):
            made = raw if isinstance(raw, Dropped) else pictures.prepare(raw, rules)
            if isinstance(made, Dropped):
                found.append({"id": made.id, "reason": made.reason, "detail": made.detail})
            else:
                width, height = made.size
                found.append({"hash": made.hash, "id": made.id, "looks": made.looks, "width": width, "height": height,
                              "image": made.image, "caption": made.caption, "label": made.label})  # fmt: skip
                size += len(made.image)
            if size >= BLOCK_BYTES or len(found) >= 10_000:
                yield pa.Table.from_pylist(found, ROWS)
                found, size = [], 0
    yield pa.Table.from_pylist(found, ROWS)


def assign(table: pa.Table, duplicates: Any, shards: dict[str, int]) -> pa.Table:
    """Adds a column `shard`, by the hash of the pixels, inside the image's bucket; "" for images that are dropped."""
    left_out = ray.get(duplicates)
    reasons, chosen = table["reason"].to_pylist(), []
    columns = (table[c].to_pylist() for c in ("id", "hash", "width", "height"))
    for i, (id, digest, width, height) in enumerate(zip(*columns, strict=True)):
        reasons[i] = reasons[i] or left_out.get(id)
        bucket = f"{width}x{height}"
        chosen.append("" if reasons[i] else f"{bucket}/{int(digest[:15], 16) % shards[bucket]:05d}")
    place = table.schema.get_field_index("reason")
    return table.set_column(place, "reason", pa.array(reasons, pa.string())).append_column("shard", pa.array(chosen, pa.string()))


def write_group(table: pa.Table, output: str, chunk_images: int, parts: bool) -> pa.Table:
    """Writes one shard, or the list of what was dropped; returns the counts."""
    row: dict[str, Any] = {"path": "", "images": 0, "bytes": 0, "dropped": "{}", "examples": "{}", "listed": "", "contents": "[]"}
    bucket, _, number = table["shard"][0].as_py().partition("/")
    if not bucket:
        listed = table.select(["id", "reason", "detail"]).sort_by([("reason", "ascending"), ("id", "ascending")])
        row["listed"] = versions.store(Location(output), f"{FILES}/listed-", _parquet([listed]), ".parquet")
        by_reason: dict[str, list[str]] = {}
        for id, reason in zip(listed["id"].to_pylist(), listed["reason"].to_pylist(), strict=True):
            by_reason.setdefault(reason, []).append(id)
        row["dropped"] = json.dumps({reason: len(ids) for reason, ids in by_reason.items()})
        row["examples"] = json.dumps({reason: ids[:3] for reason, ids in by_reason.items()})
        return pa.Table.from_pylist([row])
    data = shard(table, chunk_images)
    folder = f"{bucket}/{SHARDS}/{number}/" if parts else f"{SHARDS}/{number}/"
    path = versions.store(Location(output), folder, data, ".parquet")
    return pa.Table.from_pylist([row | {"path": path, "images": len(table), "bytes": len(data),
                                      "contents": json.dumps(shard_file.content_digests(data, None))}])  # fmt: skip


def shard(table: pa.Table, chunk_images: int) -> bytes:
    """Writes a shard as the bytes of a Parquet file: the same images, in whatever order, give the same bytes."""
    table = table.sort_by([("hash", "ascending"), ("id", "ascending")]).select([c for c in STORED if c in table.column_names])
    groups = max(1, round(len(table) / chunk_images))
    edges = [len(table) * i // groups for i in range(groups + 1)]
    return _parquet([table.slice(a, b - a) for a, b in itertools.pairwise(edges)])


def _parquet(groups: list[pa.Table]) -> bytes:
    content = hashlib.sha256()
    sink = io.BytesIO()
    schema = groups[0].schema.remove_metadata()
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False, write_page_checksum=True,
                          write_statistics=False) as writer:  # fmt: skip
        for table in groups:
            for column in table.columns:
                for value in column.to_pylist():
                    part = value if isinstance(value, bytes) else str(value).encode()
                    content.update(len(part).to_bytes(8, "little") + part)
            writer.write_table(table.combine_chunks().cast(schema), row_group_size=max(1, len(table)))
        # in the footer, which the manifest hashes: the dataset's digest then changes with any pixel
        writer.add_key_value_metadata({"content": content.hexdigest()})
    return sink.getvalue()


def footer(row: dict[str, Any], output: str) -> list[dict[str, Any]]:
    found = manifest.read_footer(Location(output), row["path"], None)
    return [{**chunk, "content": content} for chunk, content in zip(found, json.loads(row["contents"]), strict=True)]
