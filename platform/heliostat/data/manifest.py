"""The manifest: one Parquet table per dataset, a row per chunk (= Parquet row group). Its digest is the dataset's identity.

A dataset is a folder: `shards/*.parquet`, whatever its kind needs beside them (`tokenizer.json`), and `manifest.parquet`,
which is written last: a folder without it is no dataset. The table's schema metadata holds one JSON object under
`heliostat`: `kind` ("tokens": rows are documents in a `tokens` list column; "rows": a row is a sample), `digest`, and
what the pipeline wants to say (tokenizer digest, vocabulary size, counts).

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

from heliostat.errors import DataError
from heliostat.storage import Location

FILE = "manifest.parquet"
VERSIONS = "manifests"
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


def read_footer(location: Location, path: str, token_column: str | None) -> list[dict[str, Any]]:
    """The manifest rows of one shard, from its footer alone: no data page is read. DataError if it is not Parquet."""
    try:
        with location.join(path).open() as f:
            size = f.size()
            tail = f.read_at(min(size, 64 << 10), max(0, size - (64 << 10)))
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if length > size:  # a damaged length would make pyarrow reserve gigabytes
                raise pa.ArrowInvalid(f"its footer claims {length:,} of the file's {size:,} bytes")
            footer = tail[-length:] if length <= len(tail) else f.read_at(length, size - length)
            parquet = pq.read_metadata(io.BytesIO(footer))
            names = [parquet.schema.column(i).path.split(".")[0] for i in range(parquet.num_columns)]
    except (pa.ArrowException, OSError, ValueError) as e:
        raise DataError(f"{location.join(path)}: not a readable Parquet file ({e})") from e
    footer_digest = hashlib.sha256(footer).hexdigest()[:32]
    rows = []
    for group in range(parquet.num_row_groups):
        info = parquet.row_group(group)
        columns = [info.column(i) for i in range(info.num_columns)]
        tokens = [c.num_values for c, name in zip(columns, names, strict=True) if name == token_column]
        if token_column and not tokens:
            raise DataError(f"{location.join(path)}: has no column {token_column!r}")
        rows.append(
            {
                "path": path,
                "row_group": group,
                "rows": info.num_rows,
                "tokens": sum(tokens),
                "bytes": sum(c.total_compressed_size for c in columns),
                "file_bytes": size,
                "footer": footer_digest,
            }
        )
    return rows


def write(location: Location, rows: list[dict[str, Any]], meta: dict[str, Any]) -> Manifest:
    """Sorts the rows by path and row group, computes the digest and writes the manifest: the dataset now exists."""
    rows = sorted(rows, key=lambda r: (r["path"], r["row_group"]))
    chunks = pa.Table.from_pylist(rows, schema=SCHEMA)
    meta = {**meta, "digest": digest(chunks, meta)}
    buffer = io.BytesIO()
    pq.write_table(chunks.replace_schema_metadata({"heliostat": json.dumps(meta)}), buffer, compression="zstd")
    for path in (_version(meta["digest"]), FILE):
        location.join(*path.split("/")).write(buffer.getvalue())
    return Manifest(location, chunks, meta)


def _version(digest: str) -> str:
    return f"{VERSIONS}/{digest[:12]}.parquet"


def read(location: Location, digest: str | None = None) -> Manifest:
    """The newest manifest, or the version of a digest; DataError if there is none, or it is damaged."""
    newest = _read(location, FILE)
    if digest is None or newest.digest == digest:
        return newest
    try:
        found = _read(location, _version(digest))
    except DataError as e:
        raise DataError(f"{location}: the dataset changed under the run (digest {newest.digest[:12]}, was {digest[:12]})") from e
    assert found.digest == digest
    return found


def _read(location: Location, path: str) -> Manifest:
    location_of = location.join(*path.split("/"))
    try:
        raw = location_of.read()
    except FileNotFoundError as e:
        raise DataError(f"{location}: no dataset here ({FILE} is missing); make it with `heliostat prepare`") from e
    try:
        table = pq.read_table(io.BytesIO(raw))
        meta = json.loads(table.schema.metadata[b"heliostat"])
        chunks = table.replace_schema_metadata(None).cast(SCHEMA)
        if any(column.null_count for column in chunks.columns):
            raise ValueError("values are missing")
        found = digest(chunks, meta)
    except (pa.ArrowException, OSError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise DataError(f"{location_of}: not a heliostat manifest, or damaged") from e
    if found != meta.get("digest"):
        raise DataError(f"{location_of}: does not match its own digest; prepare the dataset again")
    return Manifest(location, chunks, meta)
