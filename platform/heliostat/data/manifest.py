"""The manifest: one Parquet table per dataset, a row per chunk (= Parquet row group). Its digest is the dataset's identity.

A dataset is a folder: `shards/*.parquet`, whatever its kind needs beside them (`tokenizer.json`), and `manifest.parquet`,
which is written last: a folder without it is no dataset. `manifests/` keeps every version under the first digits of its
digest, so a run can go on with the shards that it began with after others were added. The table's schema metadata holds
one JSON object under `heliostat`: `kind` ("tokens": rows are documents in a `tokens` list column; "rows": a row is a
sample), `digest`, and what the pipeline wants to say (tokenizer digest, vocabulary size, counts).

The digest is SHA-256 over the chunk table and the metadata, so it changes with any shard's bytes
(`footer` hashes the Parquet footer: sizes, offsets, statistics and the content hash that the writer put there).
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data import soundness
from heliostat.errors import DataError
from heliostat.storage import Location
from heliostat.text import brief

FILE = "manifest.parquet"
VERSIONS = "manifests"
SHARDS = "shards"
SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # relative to the dataset's folder
        ("row_group", pa.int32()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),  # 0 for kind "rows"
        ("bytes", pa.int64()),  # compressed, of the row group
        ("file_bytes", pa.int64()),
        ("footer", pa.string()),  # hex digest of the file's Parquet footer
    ]
)


@dataclass(frozen=True)
class Manifest:
    """`chunks` in manifest order, and the metadata; `location` is the dataset's folder."""

    location: Location
    chunks: pa.Table
    meta: dict[str, Any] = field(default_factory=dict)

    def fact(self, name: str) -> Any:
        """What the metadata must say for this dataset to be used so; DataError if it does not."""
        if self.meta.get(name) is None:
            raise DataError(f"{self.location}: its manifest does not say its {name!r}; prepare the dataset again")
        return self.meta[name]

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    @property
    def digest(self) -> str:
        return self.meta["digest"]

    def samples(self, sequence_length: int | None) -> np.ndarray:
        """Samples per chunk, int64: rows, or whole sequences (a chunk's last tokens, fewer than one sequence, are left out)."""
        if self.kind == "rows":
            return self.chunks["rows"].to_numpy()
        assert sequence_length, "a token dataset is cut into sequences of a given length"
        return self.chunks["tokens"].to_numpy() // sequence_length

    @property
    def tokens(self) -> int:
        return int(self.chunks["tokens"].to_numpy().sum())

    @property
    def rows(self) -> int:
        return int(self.chunks["rows"].to_numpy().sum())


def digest(chunks: pa.Table, meta: dict[str, Any]) -> str:
    """64 hex digits over the chunk rows and `meta` (without its own digest), independent of Parquet encoding."""
    h = hashlib.sha256(json.dumps({k: v for k, v in meta.items() if k != "digest"}, sort_keys=True).encode())
    for column in SCHEMA:
        values = chunks[column.name]
        text = column.type == pa.string()
        h.update("\n".join(values.to_pylist()).encode() if text else values.to_numpy().astype("<i8").tobytes())
    return h.hexdigest()


def read_footer(location: Location, path: str, token_column: str | None, vocab_size: int | None = None) -> list[dict[str, Any]]:
    """The manifest rows of one shard, from its footer alone: no data page is read.

    DataError if it is not there, not Parquet, or (as far as the footer tells) not lists of token ids below `vocab_size`.
    """
    place = location.join(path)

    def get() -> tuple[int, bytes]:
        with place.fs.open_input_file(place.path) as f:
            size = f.size()
            tail = f.read_at(min(size, 64 << 10), max(0, size - (64 << 10)))
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if length > size:  # a damaged length would make pyarrow reserve gigabytes
                raise pa.ArrowInvalid(f"its footer claims {length:,} of the file's {size:,} bytes")
            return size, tail[-length:] if length <= len(tail) else f.read_at(length, size - length)

    try:
        size, footer = place.attempt(get)
        parquet = pq.read_metadata(io.BytesIO(footer))
        names = [parquet.schema.column(i).path.split(".")[0] for i in range(parquet.num_columns)]
    except FileNotFoundError as e:
        raise DataError(f"{place}: the shard is missing") from e
    except (pa.ArrowException, OSError, ValueError) as e:
        raise DataError(f"{place}: not a readable Parquet file ({brief(e)})") from e
    if token_column:
        _check_tokens(place, parquet, [i for i, name in enumerate(names) if name == token_column], token_column, vocab_size)
    footer_digest = hashlib.sha256(footer).hexdigest()[:32]
    rows = []
    for group in range(parquet.num_row_groups):
        info = parquet.row_group(group)
        columns = [info.column(i) for i in range(info.num_columns)]
        rows.append(
            {
                "path": path,
                "row_group": group,
                "rows": info.num_rows,
                "tokens": sum(c.num_values for c, name in zip(columns, names, strict=True) if name == token_column),
                "bytes": sum(c.total_compressed_size for c in columns),
                "file_bytes": size,
                "footer": footer_digest,
            }
        )
    return rows


def _check_tokens(place: Location, parquet: pq.FileMetaData, columns: list[int], name: str, vocab_size: int | None) -> None:
    """DataError unless the column is lists of integers; where it has statistics, also without empty ones, in the vocabulary."""
    if not columns:
        raise DataError(f"{place}: has no column {name!r}")
    leaf = parquet.schema.column(columns[0])
    if len(columns) > 1 or leaf.max_repetition_level != 1 or leaf.physical_type not in ("INT32", "INT64"):
        raise DataError(f"{place}: column {name!r} is not a list of integers")
    for group in range(parquet.num_row_groups):
        found = parquet.row_group(group).column(columns[0]).statistics
        if found is None:
            continue
        if found.has_null_count and found.null_count:
            raise DataError(f"{place}: row group {group} has {found.null_count} empty documents or null tokens; leave them out")
        if vocab_size and found.has_min_max and not 0 <= found.min <= found.max < vocab_size:
            raise DataError(
                f"{place}: row group {group} has tokens from {found.min} to {found.max}, but the dataset's vocabulary is "
                f"{vocab_size}; use its tokenizer.json"
            )


def write(location: Location, rows: list[dict[str, Any]], meta: dict[str, Any]) -> Manifest:
    """Sorts the rows by path and row group, computes the digest and writes the manifest: the dataset now exists."""
    return write_table(location, pa.Table.from_pylist(rows, schema=SCHEMA), meta)


def write_table(location: Location, chunks: pa.Table, meta: dict[str, Any]) -> Manifest:
    """`write` for rows that are a table already."""
    chunks = chunks.sort_by([("path", "ascending"), ("row_group", "ascending")])
    made = Manifest(location, chunks, {**meta, "digest": digest(chunks, meta)})
    keep(made)
    location.join(FILE).write(_encode(made))
    return made


def keep(version: Manifest) -> None:
    """Sees to it that this version is among those kept: datasets made before there were any have only `manifest.parquet`."""
    place = version.location.join(VERSIONS, _name(version.digest))
    if not place.exists():
        place.write(_encode(version))


def _name(digest: str) -> str:
    return f"{digest[:12]}.parquet"


def _encode(made: Manifest) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(made.chunks.replace_schema_metadata({"heliostat": json.dumps(made.meta)}), buffer, compression="zstd")
    return buffer.getvalue()


def read(location: Location, digest: str | None = None) -> Manifest:
    """The newest manifest, or the version of a digest. DataError if there is no finished dataset or no such version of it,
    or the file does not match its own digest."""
    try:
        newest = _read(location, FILE)
    except FileNotFoundError as e:
        raise DataError(f"{location}: no dataset here ({FILE} is missing); make it with `heliostat prepare`") from e
    if digest is None or newest.digest == digest:
        return newest
    changed = f"{location}: the dataset changed under the run (digest {newest.digest[:12]}, was {digest[:12]})"
    try:
        found = _read(location, VERSIONS, _name(digest))
    except FileNotFoundError as e:
        raise DataError(f"{changed}, and that version was not kept") from e
    if found.digest != digest:
        raise DataError(f"{changed}, and {VERSIONS}/{_name(digest)} is {found.digest}, not {digest}")
    return found


def _read(location: Location, *parts: str) -> Manifest:
    place = location.join(*parts)
    raw = place.read()
    try:
        table = pq.read_table(io.BytesIO(raw))
        meta = json.loads(table.schema.metadata[b"heliostat"])
        chunks = table.replace_schema_metadata(None).cast(SCHEMA)
        if any(column.null_count for column in chunks.columns):
            raise ValueError("values are missing")
        found = digest(chunks, meta)
    except (pa.ArrowException, OSError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise DataError(f"{place}: not a heliostat manifest, or damaged") from e
    if found != meta.get("digest"):
        raise DataError(f"{place}: does not match its own digest; prepare the dataset again")
    if fault := soundness.fault(chunks, meta):
        raise DataError(f"{place}: is no manifest of a dataset ({fault}); prepare the dataset again")
    return Manifest(location, chunks, meta)
