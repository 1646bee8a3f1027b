"""Keeps an index's passages in a Lance table, in the index's folder: a version of it is a list of fragments, committed at once.

Workers write fragments, which belong to no version until one lists them. A version is never changed, and a reader opens the one
that `index.json` names, so that it sees a whole one, whatever else is being written. Lance is imported when it is used:
threads that it starts do not survive a fork.
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
os.environ.setdefault("LANCE_LOG", "error")  # it says that it makes a table, at each fragment

RECORD = "index.json"
NAME = "passages.lance"
FORMAT = "2.1"  # of its files: those of one version have one
FIELDS = [
    ("document", pa.string()),  # its id
    ("document_key", pa.int64()),  # follows from its id and its text
    ("number", pa.int32()),  # of the passage in its document, from 0
    ("begin", pa.int64()),  # characters of the document
    ("end", pa.int64()),
    ("shard", pa.string()),
    ("row_group", pa.int32()),  # in which the document begins
    ("digest", pa.string()),  # the first 32 hex digits of the SHA-256 of the text
    ("text", pa.string()),
]
PLACE = [name for name, _ in FIELDS if name != "document_key"]
INDEX_MIB = 1024  # of memory, in which a full-text index is built
KEEP = timedelta(days=1)  # for which a replaced version stays, for those who read it
LOOKED_UP = 1000  # digests at a time


def schema(dims: int | None) -> pa.Schema:
    """Returns the columns of the passages, with embeddings of `dims` numbers if there are any."""
    return pa.schema(FIELDS + ([("embedding", pa.list_(pa.float32(), dims))] if dims else []))


@open_
class IndexRecord(TypedDict):
    """Describes `index.json`. `ends`: the record of its documents, as datasets list it; `replaced`: earlier ones, since when."""

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
    """Reads the record; ConfigError if there is no finished index, DataError if the record is damaged."""
    place = index.join(RECORD)
    try:
        return RECORD_FORMAT.read(place)
    except FileNotFoundError as e:
        raise ConfigError(f"{index}: no index here ({RECORD} is missing). Make one: heliostat search index") from e


def address(index: Location) -> tuple[str, dict[str, str] | None]:
    """Returns what Lance's functions call `uri` and `storage_options` of an index's table."""
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
    """Writes passages as fragments that belong to no version yet; returns their descriptions, JSON values."""
    from lance.fragment import write_fragments

    uri, options = address(index)
    place = index.join(NAME)
    fragments = place.attempt(
        lambda: write_fragments(passages, uri, mode="overwrite", data_storage_version=FORMAT, storage_options=options)
    )
    return [fragment.to_json() for fragment in fragments]


def files(fragment: dict[str, Any]) -> list[str]:
    """Lists the files of a fragment, as paths in the table's folder."""
    return [f"data/{file['path']}" for file in fragment["files"]]


def commit(index: Location, columns: pa.Schema, fragments: list[dict[str, Any]]) -> lance.LanceDataset:
    """Makes a version of these fragments and returns it, open."""
    import lance

    (uri, options), listed = address(index), [lance.FragmentMetadata.from_json(json.dumps(one)) for one in fragments]
    operation = lance.LanceOperation.Overwrite(columns, listed)
    place = index.join(NAME)
    return place.attempt(lambda: lance.LanceDataset.commit(uri, operation, storage_options=options))


def build_indices(table: lance.LanceDataset, place: Location) -> lance.LanceDataset:
    """Builds the full-text index of a version, and with embeddings one of the digests; returns the version that has them.

    Words are found by Unicode's rules in any script, and split at a `_` or `.`; English ones are taken without endings.
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
    """Opens a version; DataError if it is not there any more."""
    import lance

    uri, options = address(index)
    return read(index, lambda: lance.dataset(uri, version=version, storage_options=options))


def read(index: Location, operation: Callable[[], T]) -> T:
    """Runs an operation that reads the table; DataError if a part of it is missing, StorageError if the store fails."""
    place = index.join(NAME)
    try:
        return place.attempt(operation)
    except (ValueError, FileNotFoundError) as e:  # Arrow passes on as ValueError what Lance raises while it reads
        if isinstance(e, ValueError) and "not found" not in str(e).lower():
            raise StorageError(f"{place}: can't read it ({brief(e)})") from e
        raise DataError(f"{place}: a part is missing ({brief(e)}). Run `heliostat search index` again") from e


def clean(table: lance.LanceDataset) -> None:
    """Deletes versions that were replaced more than a day ago, with the files that no other has."""
    table.cleanup_old_versions(older_than=KEEP)


def embeddings(index: Location, version: int, digests: list[str]) -> dict[str, np.ndarray]:
    """Looks up the embeddings of texts that a version has already, by digest."""
    table, known = open_version(index, version), dict[str, np.ndarray]()
    for start in range(0, len(digests), LOOKED_UP):
        some = ", ".join(f"'{digest}'" for digest in digests[start : start + LOOKED_UP])
        wanted = f"digest IN ({some}) AND embedding IS NOT NULL"
        rows = read(index, partial(table.to_table, columns=["digest", "embedding"], filter=wanted))
        values = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
        known |= zip(rows["digest"].to_pylist(), values, strict=True)
    return known


def document_keys(index: Location, table: lance.LanceDataset) -> np.ndarray:
    """Returns the keys of a version's documents, sorted."""

    def parts() -> list[np.ndarray]:
        batches = table.to_batches(columns=["document_key"], filter="number = 0")
        return [batch["document_key"].to_numpy(zero_copy_only=False) for batch in batches]

    return np.unique(np.concatenate([np.zeros(0, np.int64), *read(index, parts)]))
