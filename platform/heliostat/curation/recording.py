"""Decides which documents a dataset records: all, a sample, or none (the pipeline's key `record_documents`).

The record of a document is its shard, or the reason why it was dropped. The counts of all reasons are exact in each case. The
sample depends only on the ids of documents, so any distribution of documents to tasks gives the same sample. A document that
crashed, and the unread rest of a file, are always recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import xxhash

from heliostat.data.manifest import Manifest
from heliostat.tasks import care

RecordDocuments = Literal["all", "sample", "none"]
EVERY: dict[RecordDocuments, int] = {"all": 1, "sample": 1000, "none": 0}
"""A dataset records one document in so many; 0: no document. The functions below have this number as `every`."""
ALWAYS = (care.CRASHED, care.UNREAD)
FACT = "recorded_every"  # in the manifest's metadata, unless all documents are recorded


def key_of(id: str) -> int:
    """Returns the 64-bit hash of a document's id. Rows about documents are sorted by this key."""
    return xxhash.xxh64_intdigest(id.encode("utf-8", "surrogatepass"))


def is_recorded(key: int, reason: str, every: int) -> bool:
    """Checks whether the dataset records a document. `key`: hash of the document's id. `reason`: why it was dropped, or ""."""
    return every == 1 or reason in ALWAYS or (every > 0 and key % every == 0)


def recorded(table: pa.Table, every: int) -> pa.Table:
    """Returns the rows of a table of documents (with a column `id`) that the dataset records."""
    if every == 1:
        return table
    if not every:
        return table.slice(0, 0)
    return table.filter(pa.array([is_recorded(key_of(id), "", every) for id in table["id"].to_pylist()], pa.bool_()))


def rows(reasons: Mapping[str, int], every: int) -> int:
    """Estimates the number of recorded documents from the number of documents per reason."""
    always = sum(reasons.get(reason, 0) for reason in ALWAYS)
    others = sum(reasons.values()) - always
    return always + (-(-others // every) if every else 0)


def arguments(every: int) -> dict[str, Any]:
    """Returns the additional argument of tasks that record documents. Without a sample, tasks keep the arguments and the keys of
    earlier versions."""
    return {} if every == 1 else {"every": every}


def facts(every: int) -> dict[str, int]:
    """Returns the manifest's metadata about the sample; empty if the dataset records all documents."""
    return {} if every == 1 else {FACT: every}


def every_of(dataset: Manifest) -> int:
    return dataset.meta.get(FACT, 1)


def may_lack(dataset: Manifest, id: str) -> bool:
    """Checks whether the dataset may have a document that it doesn't record."""
    return not is_recorded(key_of(id), "", every_of(dataset))


def limits(every: int) -> str:
    """Returns a sentence that says which documents a dataset records; "" if the dataset records all documents."""
    if every == 1:
        return ""
    if not every:
        return "The dataset records only crashed and unread documents (record_documents: none)"
    return f"The dataset records only one document in {every:,} (record_documents: sample)"
