"""Runs the image pipeline's tasks in Ray's workers: reading, counting, training the tokenizer, distributing images to shards, and
writing shards.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.curation import recording, segment
from heliostat.curation.images import batches, drawings, pictures, planning, sources
from heliostat.curation.images.encoding import Encoding, noted
from heliostat.curation.images.fetching import Fetching
from heliostat.curation.images.latents import packed
from heliostat.curation.images.pictures import ImageRules, Raw
from heliostat.curation.images.sources import ImageColumns, ImageLimits
from heliostat.curation.pieces import FilePart
from heliostat.curation.segment import SpilledRun, survivors
from heliostat.curation.stage import Document, Dropped, Picture
from heliostat.curation.text import tokens
from heliostat.data import manifest, row_groups, versions
from heliostat.data.manifest import PLACES_KEY, SHARDS
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.spill import survivors_of

# images of a run, distributed to shards: `key` is the number of the image's shard among all shards
DEALT = pa.schema(
    [("key", pa.uint64()), ("hash", pa.binary(32)), *((name, pa.large_string()) for name in ("id", "caption", "label")),
     ("width", pa.int32()), ("height", pa.int32()), ("image", pa.large_binary()), ("columns", pa.large_string())]
)  # fmt: skip
# columns of a shard, if they exist
STORED = ("id", "caption", "label", "width", "height", "image", "latent", "embedding", "features")
ENCODED = ("embedding-", "pooled-")  # begins the names of the columns of a list of text encoders (`recipes.images.rows`)
LABEL = "label"  # the column with an image's label
CLASSES = 1000  # maximum labels in the manifest
VERSION = 2  # increased when the same images give other shards
END = "<|endoftext|>"
Shards = dict[str, tuple[int, int]]  # bucket -> (number of its first shard among all shards, count of its shards)


@dataclass(frozen=True)
class ImageSource:
    """Reads the images of an input in Ray's workers. Each part of the input is the description of a reading task
    (`planning.task_of`)."""

    by_text: ClassVar[bool] = False

    input: str
    columns: ImageColumns
    rules: ImageRules
    limits: ImageLimits
    spill: Location
    fetching: Fetching | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        """Returns the names of columns that the input adds to every shard."""
        return drawings.COLUMNS if self.input.startswith(drawings.SCHEME) else ()

    def _raw(self, task: dict[str, Any]) -> Iterator[Raw | Dropped]:
        if self.fetching:
            return self.fetching.read(self.spill, task, self.columns)
        return sources.read(self.input, task, self.columns, self.limits)

    def read(self, part: FilePart) -> Iterator[Document | Dropped]:
        for raw in self._raw(planning.task_of(self.spill, part)):
            caption = raw if isinstance(raw, Dropped) else pictures.clean(raw, self.rules)
            if isinstance(caption, Dropped):
                yield caption
                continue
            assert isinstance(raw, Raw) and raw.image is not None
            columns = {**raw.columns, **({LABEL: raw.label} if raw.label else {})}
            yield Document(raw.id, caption, columns, Picture(raw.image))

    def finish(self, document: Document) -> Document | Dropped:
        assert document.picture is not None and isinstance(document.text, str)
        raw = Raw(document.id, document.picture.data, document.text)
        if document.picture.hash:  # a stage may have changed the caption
            caption = pictures.clean(raw, self.rules)
            return caption if isinstance(caption, Dropped) else Document(raw.id, caption, document.columns, document.picture)
        prepared = pictures.prepare(raw, self.rules)
        if isinstance(prepared, Dropped):
            return prepared
        picture = Picture(prepared.image, bytes.fromhex(prepared.hash), prepared.looks, prepared.size)
        return Document(prepared.id, prepared.caption, document.columns, picture)


def count(folder: Location, runs: list[SpilledRun]) -> dict[str, object]:
    """Counts the images in some temporary files by bucket, and lists the images' labels: at most CLASSES + 1."""
    buckets, labels = Counter[str](), set[str]()
    for table in survivors_of(folder, runs, columns=["width", "height", "columns"]):
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
        buckets.update(f"{width}x{height}" for width, height in sizes)
        if len(labels) <= CLASSES:
            labels |= {label for columns in pc.unique(table["columns"]).to_pylist() if (label := _label(columns))}
    return {"buckets": dict(sorted(buckets.items())), "labels": sorted(labels)[: CLASSES + 1]}


def _label(columns: str | None) -> str:
    return json.loads(columns).get(LABEL, "") if columns else ""


def train(folder: Location, vocab_size: int, runs: list[SpilledRun]) -> dict[str, object]:
    """Trains a tokenizer on all captions. The tokenizer doesn't depend on the order of the captions. Returns the name of the
    tokenizer's temporary file."""
    tables = survivors_of(folder, runs, columns=["text"])
    texts = (text for table in tables for text in table["text"].to_pylist())
    name = segment.store(folder, tokens.train(texts, vocab_size, END))
    return {"definition": name, "files": [name]}


# shards ----------------------------------------------------------------------------------------------------------------


def deal(folder: Location, run: SpilledRun, shards: Shards, encoding: Encoding | None = None) -> dict[str, object]:
    """Writes images to a temporary file, sorted by shard. With `encoding`, also encodes the images."""
    table = dealt(folder, run, shards)
    if encoding is None:
        return stored(folder, [table])
    encoder = encoding.encoder(folder)
    encoded = [encoder(batch, encoding.captions) for batch in encoding.batches(table)]
    return stored(folder, [one.table for one in encoded] or [table]) | noted(encoded)


def dealt(folder: Location, run: SpilledRun, shards: Shards) -> pa.Table:
    """Reads the images of a temporary file (schema DEALT). An image's pixel hash selects one of the shards of the image's
    bucket."""
    return pa.concat_tables([DEALT.empty_table(), *(_dealt(table, shards) for table in survivors(folder, run))])


def stored(folder: Location, tables: list[pa.Table]) -> dict[str, Any]:
    """Writes images to a temporary file, sorted by shard. Returns the file's part of a record."""
    table = pa.concat_tables(tables)
    name = spill.write(folder, table, ("hash", "id"))
    return {"dealt": [name, len(table), table.nbytes], "files": [name]}


def _dealt(table: pa.Table, shards: Shards) -> pa.Table:
    sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
    first, number = np.array([shards[f"{width}x{height}"] for width, height in sizes], np.uint64).reshape(-1, 2).T
    place = first + (table["key"].to_numpy() >> np.uint64(4)) % number  # 60 bits of the hash select the shard
    labels = [_label(packed_columns) for packed_columns in table["columns"].to_pylist()]
    columns = [pa.array(place), table["hash"], table["id"], table["text"], pa.array(labels, pa.large_string()),
               *(table[c] for c in ("width", "height", "image", "columns"))]  # fmt: skip
    return pa.Table.from_arrays(columns, schema=DEALT)


def encode_nothing(folder: Location, encoding: Encoding) -> dict[str, object]:
    """Writes the text encoders' outputs for the empty caption to a temporary file, one after the other, in float16. Returns the
    file's name, and the output's shape. For a list of text encoders, returns what the dataset stores of each encoder (`texts`).
    """
    from heliostat.recipes.images.stored_arrays import ArrayFormat

    encoder = encoding.encoder(folder)
    embeddings = encoder.embeddings([""])
    rows = [packed(one.key, ArrayFormat(one.form.shape), one.values, (name,))[0][0] for name, one in embeddings.items()]
    name = spill.put(folder, b"".join(rows), ".bin")
    shapes = {"shape": list(embeddings["embedding"].form.shape)} if "embedding" in embeddings else {}
    texts = {} if shapes else {"texts": [one.named() for one in encoder.stored()]}
    return {"name": name, **shapes, **texts, "files": [name]}


def write_shard(folder: Location, number: int, prefix: str, chunk_images: int, output: str, explained: bool,
                names: list[str], stored: tuple[str, ...] = (), every: int = 1) -> dict[str, object]:  # fmt: skip
    """Writes the shard with this number. Returns the shard's number of images and bytes, and the manifest's rows for the shard.

    `stored`: names of columns that stages add to the columns of every image shard. `every`: see `recording`.
    """
    tables = list(spill.read_all(folder, names, number, number + 1))
    if not tables:  # the dataset has few images, and no image has a hash that selects this shard
        return {"path": "", "file_bytes": 0, "images": 0, "ends": []}
    table = pa.concat_tables(tables)
    data = shard(_with(table, stored), chunk_images, (*STORED, *stored, *(f"embedding_{name}" for name in stored)))
    path = versions.store(Location(output), prefix, data, ".parquet")
    kept = recording.recorded(table, every)
    ends = [_ends(folder, path, kept)] if explained and len(kept) else []
    described = row_groups.written(Location(output), path, data, None)
    return {**described, "images": len(table), "ends": ends, "files": ends}


def _with(table: pa.Table, stored: tuple[str, ...]) -> pa.Table:
    """Appends the columns `stored` to a table, as strings; "" for missing values."""
    for name in stored:
        table = table.append_column(name, pa.array(batches.further(table, name), pa.large_string()))
    return table


def _ends(folder: Location, path: str, table: pa.Table) -> str:
    """Writes a record for each kept image to a temporary file: the image's id, and the path of the image's shard. Returns the
    file's name."""
    rows = [{"key": recording.key_of(row["id"]), "id": row["id"], "stage": "shard", "reason": "kept", "detail": path,
             "hash": row["hash"].hex(), "columns": row["columns"]}
            for row in table.select(["id", "hash", "columns"]).to_pylist()]  # fmt: skip
    return spill.write(folder, pa.Table.from_pylist(rows, segment.LEFT_OUT), ("id", "stage", "reason", "detail"))


def folder_of(bucket: str, number: int, parts: bool) -> str:
    """Returns the folder of a shard, as a prefix of paths. `number`: the shard's index in its bucket; `parts`: whether the
    dataset has several buckets."""
    return f"{bucket}/{SHARDS}/{number:05d}/" if parts else f"{SHARDS}/{number:05d}/"


def shard(table: pa.Table, chunk_images: int, columns: tuple[str, ...] = STORED) -> bytes:
    """Returns a shard as the bytes of a Parquet file. The order of the images in `table` doesn't change the bytes.

    The hash of an image's pixels is its hold-out position (`manifest.place`), and a row group ends at each position where texts'
    row groups end. So at these fractions, datasets hold out the same images, also at other sizes and with other captions.
    """
    encoded = sorted(c for c in table.column_names if c.startswith(ENCODED))
    kept = [c for c in (*columns, *encoded) if c in table.column_names]
    table = table.sort_by([("hash", "ascending"), ("id", "ascending")])
    places = np.array([manifest.place(hash.hex()) for hash in table["hash"].to_pylist()], np.int64)
    groups = tokens.documents_in(np.ones(len(table), np.int64), chunk_images, places)
    table, edges = spill.narrowed(table.select(kept)), itertools.accumulate((count for count, _ in groups), initial=0)
    return _parquet([table.slice(a, b - a) for a, b in itertools.pairwise(edges)], [place for _, place in groups])


def without(file: pq.ParquetFile, id: str) -> tuple[bytes | None, int]:
    """Rewrites an open shard without an image.

    Returns two values: the new file (None if no image is left), and the total bytes of the removed image and its caption. If the
    shard stores latents, only the caption's bytes count. The other images stay in their row groups, which keep their hold-out
    positions.
    """
    known = (file.metadata.metadata or {}).get(PLACES_KEY)
    old, places = json.loads(known) if known else None, list[int]()
    left, size = list[pa.Table](), 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        named = pc.equal(table["id"], id)
        for row in table.filter(named).to_pylist():
            size += len(row["caption"].encode()) + len(row.get("image") or b"")
        if len(kept := table.filter(pc.invert(named))):
            left.append(kept)
            places += [old[group]] if old else []
    return (_parquet(left, places if old else None) if left else None), size


def _parquet(groups: list[pa.Table], places: list[int] | None) -> bytes:
    """Writes row groups. `places`: their hold-out positions; None for a shard of an earlier version of heliostat."""
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
        # the manifest hashes the footer, so the dataset's digest changes with any pixel
        writer.add_key_value_metadata({"content": content.hexdigest()})
        if places is not None:
            writer.add_key_value_metadata({PLACES_KEY.decode(): json.dumps(places)})
    return sink.getvalue()
