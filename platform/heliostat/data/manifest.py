"""Defines the manifest: a Parquet table with a row for each row group (chunk) of a dataset. Its digest identifies the dataset.

A dataset is a folder with `shards/`, other files that its kind needs (`tokenizer.json`), and `manifest.parquet`. The manifest is
written last: a folder without it isn't a dataset. `manifests/` keeps every version, named after the first digits of its digest.
So a run keeps the shards that it began with when shards are added, or the dataset is prepared again. The table's schema metadata
holds one JSON object under `heliostat`. Its keys: `kind` ("tokens": rows are documents in a `tokens` list column; "rows": a row
is a sample), `digest`, `files` (plain name -> this version's own copy), `also` (paths of its other files), and the pipeline's
values (tokenizer digest, vocabulary size, counts). A manifest with a path outside its folder is rejected.

The digest is SHA-256 over the chunk table and the metadata without `hub` and `stored_errors`. So files from the Hub and a folder
give the same one. It changes with any shard's bytes: `footer` hashes the Parquet footer (sizes, offsets, statistics, the writer's
content hash).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field
from typing_extensions import TypedDict

from heliostat.config.workspace import pipeline_of
from heliostat.data import mapped, shard, stored_rows
from heliostat.data.manifest_table import (
    SCHEMA,
    RowGroups,
    Rows,
    by_first_use,
    compact,
    digest,
    encode,
    in_memory,
    in_order,
    total,
)  # fmt: skip
from heliostat.data.stored_rows import StoredRows
from heliostat.errors import DataError, MissingDataError
from heliostat.storage.locations import LEAVES, Location
from heliostat.storage.records import Format, Whole, open_
from heliostat.text import brief

FILE = "manifest.parquet"
VERSIONS, SHARDS = "manifests", "shards"
FILES = "files"  # files of a version other than shards, each named after its content
BESIDE = ("tokenizer.json", "empty_caption.bin")  # files that versions without `files` in their metadata may have
UNCOVERED = ("seconds.json", "pipeline.json")  # next to the shards of versions with `also`: files that no digest covers
PLACES = 1 << 52  # number of places; a document's place follows from its text's hash. The split holds out places below a fraction
PLACES_KEY = b"heliostat.places"  # in a shard's footer: the place of each row group
LARGEST = 2**48  # maximum rows, tokens, or bytes of a row group or its file, so that all sums stay within 64 bits
COUNTED = ("row_group", "rows", "tokens", "bytes", "file_bytes")


@open_
class Curation(TypedDict):
    """Lists the record files of curation. `funnel`: path of the counts per stage; `ends`: (first key in hex, path) per file."""

    funnel: NotRequired[str]
    ends: NotRequired[list[Annotated[list[str], Field(min_length=2, max_length=2)]]]


@open_
class Meta(TypedDict):
    """Describes the metadata that the engine itself reads from a manifest. Pipelines add more keys."""

    kind: Annotated[str, Field(min_length=1)]
    digest: str
    name: NotRequired[str]
    tokenizer: NotRequired[str | None]
    vocab_size: NotRequired[Annotated[int, Field(gt=0, lt=2**31)] | None]
    end_of_document: NotRequired[Annotated[int, Field(ge=0, lt=2**31)] | None]
    documents: NotRequired[Whole]
    duplicates: NotRequired[Whole]
    dropped: NotRequired[dict[str, Whole]]
    parts: NotRequired[dict[str, Whole]]
    also: NotRequired[list[str]]
    curation: NotRequired[Curation]
    unigram_entropy: NotRequired[float | None]


META = Format(Meta, "metadata")


@dataclass(frozen=True)
class Manifest:
    """Holds a dataset's row groups, in manifest order, and its metadata. `location`: the dataset's folder."""

    location: Location
    row_groups: RowGroups
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def chunks(self) -> pa.Table:
        """Returns the row groups as a table. Loads stored row groups into memory."""
        return in_memory(self.row_groups)

    def fact(self, name: str) -> Any:
        """Returns a value from the metadata that the caller needs. Raises DataError if the value is missing."""
        if self.meta.get(name) is None:
            raise DataError(f"{self.location}: the manifest lacks {name!r}. Prepare the dataset again")
        return self.meta[name]

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    @property
    def digest(self) -> str:
        return self.meta["digest"]

    def samples(self, sequence_length: int | None) -> np.ndarray:
        """Counts the samples of each row group, int64 [chunks]: rows, or complete sequences of `sequence_length` tokens."""
        if self.kind == "rows":
            return self.chunks["rows"].to_numpy()
        assert sequence_length, "samples of a token dataset need a sequence_length"
        return self.chunks["tokens"].to_numpy() // sequence_length

    def file(self, name: str) -> Location:
        """Returns the location of a version's file other than a shard, such as `tokenizer.json`."""
        if path := self.meta.get("files", {}).get(name):
            return self.location.join(path)
        kept = self.location.join(kept_path(self.digest, name))
        return kept if kept.exists() else self.location.join(name)

    def uncovered(self, name: str) -> dict[str, Any]:
        """Reads one of the UNCOVERED files of this version; empty if the dataset doesn't have this file."""
        try:
            return json.loads(self.location.join(kept_path(self.digest, name)).read())
        except FileNotFoundError:
            return {}

    @property
    def paths(self) -> list[str]:
        """Lists the paths of the shards, each once, in manifest order."""
        if isinstance(self.row_groups, StoredRows):
            return self.row_groups.shards["path"].to_pylist()
        return by_first_use(self.chunks["path"]).chunk(0).dictionary.to_pylist()

    @property
    def sizes(self) -> dict[str, int]:
        """Maps the path of each shard to the size of its file, in bytes."""
        paths = by_first_use(self.chunks["path"]).chunk(0)
        sizes = np.zeros(len(paths.dictionary), np.int64)
        sizes[paths.indices.to_numpy()] = self.chunks["file_bytes"].to_numpy()
        return dict(zip(paths.dictionary.to_pylist(), sizes.tolist(), strict=True))

    @property
    def places(self) -> np.ndarray:
        """Returns the place of each row group, which decides the held-out split: int64 [chunks], in 1/PLACES; -1: unknown."""
        return self.chunks["place"].to_numpy()

    @property
    def tokens(self) -> int:
        return total(self.row_groups, "tokens")

    @property
    def rows(self) -> int:
        return total(self.row_groups, "rows")


def place(hash: str) -> int:
    """Computes a document's place from the hash of its text (hex). The place decides whether the document is held out."""
    return PLACES - 1 - int(hash[:13], 16)


def read_footer(location: Location, path: str, token_column: str | None, vocab_size: int | None = None) -> list[dict[str, Any]]:
    """Reads the manifest rows of one shard from the shard's footer. Reads no data pages.

    Raises DataError if the shard is missing or isn't Parquet. With `token_column`, raises DataError, too, if the footer shows
    that this column doesn't hold lists of token ids below `vocab_size`.
    """
    place = location.join(path)

    def get() -> shard.Footer:
        with place.fs.open_input_file(place.path) as f:
            return shard.read_footer(f)

    try:
        footer = place.attempt(get)
        parquet = footer.parquet
        names = [parquet.schema.column(i).path.split(".")[0] for i in range(parquet.num_columns)]
    except FileNotFoundError as e:
        raise DataError(f"{place}: the shard is missing. Restore it, or prepare the dataset again") from e
    except (pa.ArrowException, OSError, ValueError) as e:
        raise DataError(f"{place}: isn't a readable Parquet file ({brief(e)}). Restore or remove the file") from e
    if token_column:
        _check_tokens(place, parquet, [i for i, name in enumerate(names) if name == token_column], token_column, vocab_size)
    places = _places(parquet)
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
                "file_bytes": footer.size,
                "footer": footer.digest,
                "place": places[group],
            }
        )
    return rows


def _places(parquet: pq.FileMetaData) -> list[int]:
    """Reads the place of each row group from the footer; -1 for all if the footer has no places that fit the row groups."""
    unknown = [-1] * parquet.num_row_groups
    try:
        places = json.loads((parquet.metadata or {}).get(PLACES_KEY, b"[]"))
    except ValueError:
        return unknown
    right = isinstance(places, list) and len(places) == len(unknown) and all(type(p) is int and 0 <= p < PLACES for p in places)
    return places if right else unknown


def _check_tokens(place: Location, parquet: pq.FileMetaData, columns: list[int], name: str, vocab_size: int | None) -> None:
    """Raises DataError unless the column holds lists of integers and, by its statistics, no empty list or unknown token."""
    if not columns:
        raise DataError(f"{place}: has no column {name!r}. Write the shard with the columns of the dataset's other shards")
    leaf = parquet.schema.column(columns[0])
    if len(columns) > 1 or leaf.max_repetition_level != 1 or leaf.physical_type not in ("INT32", "INT64"):
        raise DataError(f"{place}: column {name!r} isn't a list of integers. Write the column as a list of token ids")
    for group in range(parquet.num_row_groups):
        bounds = parquet.row_group(group).column(columns[0]).statistics
        if bounds is None:
            continue
        if bounds.has_null_count and bounds.null_count:
            raise DataError(f"{place}: row group {group} has {bounds.null_count} empty documents or null tokens. Leave them out")
        if vocab_size and bounds.has_min_max and not 0 <= bounds.min <= bounds.max < vocab_size:
            raise DataError(
                f"{place}: row group {group} has tokens from {bounds.min} to {bounds.max}, but the dataset's "
                f"vocabulary has {vocab_size}. Use the dataset's tokenizer.json"
            )


def write(location: Location, rows: Rows, meta: Mapping[str, object]) -> Manifest:
    """Sorts the rows by path and row group, computes the digest, and writes the manifest. The dataset now exists.

    `rows`: stored rows; or a table or a list, with the columns of SCHEMA. The columns in `LATER` may be missing.
    """
    row_groups = in_order(rows)
    version = Manifest(location, row_groups, {**meta, "digest": digest(row_groups, meta)})
    with _encoded(version) as file:
        if not (kept := _kept(version)).exists():
            kept.upload_open(file)
        location.join(FILE).upload_open(file)
    return version


@contextmanager
def _encoded(version: Manifest) -> Iterator[IO[bytes]]:
    """Writes a version's file to a temporary file, which may be larger than the memory."""
    with closing(stored_rows.temporary()) as file:
        with stored_rows.explained():
            encode(version.row_groups, version.meta, file)
            file.flush()
        yield file


def keep(version: Manifest) -> None:
    """Stores this version in `manifests/` if it isn't there yet. Older datasets have only `manifest.parquet`."""
    if not (kept := _kept(version)).exists():
        with _encoded(version) as file:
            kept.upload_open(file)


def _kept(version: Manifest) -> Location:
    return version.location.join(VERSIONS, version_name(version.digest))


def version_name(digest: str) -> str:
    return f"{digest[:12]}.parquet"


def kept_path(digest: str, name: str) -> str:
    """Returns the path at which a version without `files` keeps its file `name` once a newer version replaces it."""
    return f"{FILES}/{digest[:12]}-{name}"


def read_version(location: Location, name: str) -> Manifest:
    """Reads the version in a file of `manifests/`. Raises DataError if the file can't be read."""
    return _read(location, VERSIONS, name)


def read(location: Location, digest: str | None = None) -> Manifest:
    """Reads the newest manifest, or the version with a given digest.

    Raises MissingDataError if the folder has no finished dataset. Raises DataError if that version is missing or damaged.
    """
    try:
        newest = _read(location, FILE)
    except FileNotFoundError as e:
        file = pipeline_of(location) or "PIPELINE.yaml"
        raise MissingDataError(
            f"{location}: no dataset here ({FILE} is missing). Prepare it: heliostat data prepare {file}"
        ) from e
    if digest is None or newest.digest == digest:
        return newest
    changed = f"{location}: the dataset changed during the run (digest {newest.digest[:12]}, was {digest[:12]})"
    try:
        manifest = _read(location, VERSIONS, version_name(digest))
    except FileNotFoundError as e:
        raise DataError(f"{changed}, and heliostat didn't keep the earlier version. Train under a new name") from e
    if manifest.digest != digest:
        raise DataError(f"{changed}, and {VERSIONS}/{version_name(digest)} has digest {manifest.digest}, not {digest}")
    return manifest


def read_shared(location: Location, digest: str) -> Manifest:
    """Reads the version with a given digest. All processes of this machine share one copy of a large table."""
    file = location.join(FILE)
    if file.attempt(lambda: file.fs.get_file_info(file.path).size or 0) < mapped.LARGE:  # a small file has few row groups
        return read(location, digest)
    return _shared(location, digest, lambda: read(location, digest))


def share(get: Callable[[], Manifest]) -> Manifest:
    """Gets a manifest. If its table is large, moves the table to a file that all processes of this machine share."""
    version = _moved(get())
    pa.default_memory_pool().release_unused()  # otherwise Arrow keeps the memory of the freed table
    return version


def _moved(own: Manifest) -> Manifest:
    return own if len(own.chunks) < mapped.LARGE else _shared(own.location, own.digest, lambda: own)


def _shared(location: Location, digest: str, get: Callable[[], Manifest]) -> Manifest:
    def build() -> pa.Table:
        version = get()
        return version.chunks.replace_schema_metadata({"heliostat": json.dumps(version.meta)})

    table = mapped.table(["manifest", digest], build)
    return Manifest(location, table.replace_schema_metadata(None), json.loads(table.schema.metadata[b"heliostat"]))


def _read(location: Location, *parts: str) -> Manifest:
    place = location.join(*parts)
    raw = place.read()
    try:
        table = pq.read_table(pa.BufferReader(raw), read_dictionary=["path", "footer"])
        meta = json.loads(table.schema.metadata[b"heliostat"])
        columns = dict(zip(table.column_names, table.columns, strict=True))
        del table, raw
        chunks = pa.table(compact(columns))
        chunks.validate(full=True)
        others = [f.name for f in SCHEMA if f.type not in (pa.string(), chunks.schema.field(f.name).type)]
        if others or any(column.null_count for column in chunks.columns):
            raise ValueError("columns of other types, or values are missing")
        computed, outside = digest(chunks, meta), _outside(chunks, meta)
    except (pa.ArrowException, OSError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise DataError(f"{place}: isn't a heliostat manifest, or is damaged. Prepare the dataset again") from e
    if computed != meta.get("digest"):
        raise DataError(f"{place}: doesn't match its own digest. Prepare the dataset again")
    if outside is not None:
        raise DataError(f"{place}: lists {outside!r}, a path outside the dataset. Don't use this dataset")
    if fault := _unsound(chunks, meta):
        raise DataError(f"{place}: isn't a valid manifest ({fault}). Prepare the dataset again")
    return Manifest(location, chunks, meta)


def _outside(chunks: pa.Table, meta: Mapping[str, Any]) -> str | None:
    """Finds the first path that leaves the dataset's folder (`../x`, `/x`) or is invalid (`a//b`); None if all are valid."""
    files, digests, curation = meta.get("files", {}), meta.get("digests", {}), meta.get("curation", {})
    named = [*meta.get("parts", {}), *files, *files.values(), *digests, *digests.values(), *meta.get("also", [])]
    named += [path for path in [curation.get("funnel")] if path is not None] + [path for _, path in curation.get("ends", [])]
    paths = pa.chunked_array([pc.unique(chunks["path"]).cast(pa.string()), pa.array(named, pa.string())])
    bad = paths.filter(pc.match_substring_regex(paths, LEAVES))
    return bad[0].as_py() if len(bad) else None


def _unsound(chunks: pa.Table, meta: object) -> str:
    """Describes the first impossible value in a manifest's chunks and metadata; empty if all are possible."""
    try:
        META.build(meta, "its metadata")
    except DataError as e:
        return str(e)
    for name in COUNTED:
        least, most = pc.min_max(chunks[name]).values()
        if chunks.num_rows and not 0 <= least.as_py() <= most.as_py() < LARGEST:
            return f"{name}: values from {least} to {most}"
    footers = pc.unique(chunks["footer"]).cast(pa.string())
    wrong = pc.invert(pc.match_substring_regex(footers, "^[0-9a-f]{16,128}$"))
    if pc.any(wrong).as_py():
        return f"footer: {footers.filter(wrong)[0].as_py()[:100]!r} isn't a digest"
    return ""
