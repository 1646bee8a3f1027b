"""Stores an index's passages in a Lance table in the index's folder. A version is a list of fragments. One commit adds a complete
version.

Workers write fragments. A fragment belongs to no version until a commit lists it. A version never changes. A reader opens the
version that `index.json` names, so this reader always sees a complete version, even while another version is written. Lance is
imported at first use, because its threads don't survive a fork.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import Field
from typing_extensions import TypedDict

from heliostat.errors import ConfigError, DataError, StorageError
from heliostat.storage import s3_client
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Inside, Number, Whole, open_
from heliostat.storage.retries import retry_budget
from heliostat.text import brief

if TYPE_CHECKING:
    import lance

T = TypeVar("T")
os.environ.setdefault("LANCE_LOG", "error")  # without this, Lance logs a line for each fragment

RECORD = "index.json"
NAME = "passages.lance"
FORMAT = "2.1"  # format version of Lance's files: all files of a table version need the same format
FIELDS = [
    ("document", pa.string()),  # id of the document
    ("document_key", pa.int64()),  # hash of the document's id and text
    ("number", pa.int32()),  # number of the passage in its document, from 0
    ("begin", pa.int64()),  # position in the document, in characters
    ("end", pa.int64()),
    ("shard", pa.string()),
    ("row_group", pa.int32()),  # row group in which the document begins
    ("digest", pa.string()),  # the first 32 hex digits of the SHA-256 of the text
    ("text", pa.string()),
]
PLACE = [name for name, _ in FIELDS if name != "document_key"]
INDEX_MIB = 1024  # memory limit for building a full-text index
KEEP = timedelta(days=1)  # a replaced version is kept this long, for its readers
LOOKED_UP = 1000  # digests per query


def schema(dims: int | None) -> pa.Schema:
    """Returns the columns of an index's Lance table. `dims`: size of an embedding; None means no embeddings."""
    return pa.schema(FIELDS + ([("embedding", pa.list_(pa.float32(), dims))] if dims else []))


@open_
class IndexRecord(TypedDict):
    """Describes `index.json`. `ends`: the files with the record of the documents, in the format of a dataset's manifest.
    `replaced`: such files of earlier versions, with the time when they were replaced, in Unix seconds."""

    dataset: dict[str, Any]
    embedder: dict[str, Any] | None
    settings: object
    documents: object
    passages: object
    version: Whole
    ends: list[Annotated[list[Inside], Field(min_length=2, max_length=2)]]
    replaced: NotRequired[dict[Inside, Number]]


RECORD_FORMAT = Format(IndexRecord, "record of an index", fix="Run `heliostat search index` again")


def read_record(index: Location) -> IndexRecord:
    """Reads an index's record; raises ConfigError if there is no finished index, DataError if the record is damaged."""
    place = index.join(RECORD)
    try:
        return RECORD_FORMAT.read(place)
    except FileNotFoundError as e:
        raise ConfigError(f"{index}: no index here ({RECORD} is missing). Build an index: heliostat search index") from e


def address(index: Location) -> tuple[str, dict[str, str] | None]:
    """Returns the arguments `uri` and `storage_options` of Lance's functions for an index's table."""
    place = index.join(NAME)
    if not place.is_s3:
        return place.path, None
    s3 = s3_client.resolve(place.query)
    options = {"aws_region": s3.region, "client_retry_timeout": str(max(1, int(retry_budget())))}
    if s3.url:
        options |= {"aws_endpoint": s3.url, "allow_http": str(s3.scheme == "http").lower()}
    if s3.anonymous:
        options["aws_skip_signature"] = "true"
    return f"s3://{place.path}", options


def write(index: Location, passages: pa.Table) -> list[dict[str, Any]]:
    """Writes passages as fragments that belong to no version yet; returns the fragments' descriptions as JSON values."""
    from lance.fragment import write_fragments

    uri, options = address(index)
    place = index.join(NAME)
    fragments = place.attempt(
        lambda: write_fragments(passages, uri, mode="overwrite", data_storage_version=FORMAT, storage_options=options)
    )
    return [fragment.to_json() for fragment in fragments]


def files(fragment: dict[str, Any]) -> list[str]:
    """Lists a fragment's files, as paths in the table's folder."""
    return [f"data/{file['path']}" for file in fragment["files"]]


def commit(index: Location, columns: pa.Schema, fragments: list[dict[str, Any]]) -> lance.LanceDataset:
    """Commits these fragments as a new version. Opens and returns this version."""
    import lance

    (uri, options), listed = address(index), [lance.FragmentMetadata.from_json(json.dumps(one)) for one in fragments]
    operation = lance.LanceOperation.Overwrite(columns, listed)
    place = index.join(NAME)
    return place.attempt(lambda: lance.LanceDataset.commit(uri, operation, storage_options=options))


def build_indices(table: lance.LanceDataset, place: Location) -> lance.LanceDataset:
    """Builds the full-text index of a version. If the version has embeddings, builds an index of the texts' digests too. Returns
    the table with its new indexes.

    Text in any script is split into words by Unicode's rules, and also at `_` and `.`. English words are stemmed.
    """
    place.attempt(
        lambda: table.create_scalar_index(
            "text", "INVERTED", base_tokenizer="icu/split", language="English", stem=True, remove_stop_words=False,
            with_position=False, memory_limit=INDEX_MIB,
        )
    )  # fmt: skip
    if "embedding" in table.schema.names:
        place.attempt(lambda: table.create_scalar_index("digest", "BTREE"))
    return table


def open_version(index: Location, version: int) -> lance.LanceDataset:
    """Opens a version of the table; raises DataError if this version no longer exists."""
    import lance

    uri, options = address(index)
    return read(index, lambda: lance.dataset(uri, version=version, storage_options=options))


def read(index: Location, operation: Callable[[], T]) -> T:
    """Runs an operation that reads the table. Raises DataError if a part of the table is missing, StorageError if the store
    fails."""
    place = index.join(NAME)
    try:
        return place.attempt(operation)
    except (ValueError, FileNotFoundError) as e:  # Arrow raises Lance's read errors as ValueError
        if isinstance(e, ValueError) and "not found" not in str(e).lower():
            raise StorageError(f"{place}: can't read the index ({brief(e)})") from e
        raise DataError(f"{place}: a part of the index is missing ({brief(e)}). Run `heliostat search index` again") from e


def clean(table: lance.LanceDataset) -> None:
    """Deletes the versions that were replaced more than a day ago, and the files that only these versions use."""
    table.cleanup_old_versions(older_than=KEEP)


def embeddings(index: Location, version: int, digests: list[str]) -> dict[str, np.ndarray]:
    """Maps digests of texts to the embeddings (float32 [dims]) that a version already has for these texts."""
    table, known = open_version(index, version), dict[str, np.ndarray]()
    for start in range(0, len(digests), LOOKED_UP):
        some = ", ".join(f"'{digest}'" for digest in digests[start : start + LOOKED_UP])
        wanted = f"digest IN ({some}) AND embedding IS NOT NULL"
        rows = read(index, partial(table.to_table, columns=["digest", "embedding"], filter=wanted))
        values = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
        known |= zip(rows["digest"].to_pylist(), values, strict=True)
    return known


def document_keys(index: Location, table: lance.LanceDataset) -> np.ndarray:
    """Returns the keys of a version's documents: int64, sorted, without duplicates."""

    def parts() -> list[np.ndarray]:
        batches = table.to_batches(columns=["document_key"], filter="number = 0")
        return [batch["document_key"].to_numpy(zero_copy_only=False) for batch in batches]

    return np.unique(np.concatenate([np.zeros(0, np.int64), *read(index, parts)]))
