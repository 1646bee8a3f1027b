"""Indexes the shards that were added to a dataset's folder, as a new version of its manifest: `heliostat data index DATASET`.

- heliostat reads only the footers of the new shards, several in parallel, and no data.
- The shards in the manifest must exist with their recorded sizes.
- The previous version stays readable by its digest. So runs that began with the previous version keep their sample order.
- It doesn't matter whether shards are indexed together or one after another: the digest is the same. Without new shards, nothing
  is written.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from heliostat.data import device_threads, manifest, row_groups, versions
from heliostat.data.infilling import COUNTS
from heliostat.data.manifest import SHARDS, Manifest
from heliostat.data.manifest_table import in_memory
from heliostat.data.row_groups import ShardCollector
from heliostat.errors import DataError
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)

READERS = 32  # threads: a footer takes one or two small requests, which object storage answers slowly but in parallel
NOT_IN_FOOTERS = ("bytes", "cuts", "unigram_entropy", COUNTS)  # computed from the text or the tokens: wrong once shards are added


@dataclass(frozen=True)
class IndexReport:
    """Reports the result of indexing.

    `previous`: the digest before indexing; `chunks`, `tokens`, `rows`: of the complete dataset.
    """

    dataset: str
    digest: str
    previous: str
    shards_added: int
    chunks: int
    tokens: int
    rows: int
    seconds: float


def index(location: Location) -> IndexReport:
    """Indexes the new shards of a dataset.

    Raises DataError if a listed shard is missing or has another size, or if a new shard's columns or tokens don't fit the
    dataset.
    """
    start = time.monotonic()
    before = manifest.read(location)
    sizes = {f"{SHARDS}/{path}": size for path, size in location.join(SHARDS).files()}
    listed = before.sizes
    _check_listed(location, listed, sizes)
    unlisted = {p for p in sizes if p not in listed and p.count("/") == 1 and p.endswith(".parquet")}
    new = sorted(unlisted - _of_replaced(location)) if unlisted else []
    if len(new) < len(unlisted):
        log.info("%s: ignoring %d shards of replaced versions", location, len(unlisted) - len(new))
    after = _extend(before, new) if new else before
    return IndexReport(
        dataset=str(location),
        digest=after.digest,
        previous=before.digest,
        shards_added=len(new),
        chunks=after.chunks.num_rows,
        tokens=after.tokens,
        rows=after.rows,
        seconds=round(time.monotonic() - start, 2),
    )


def _of_replaced(location: Location) -> set[str]:
    """Lists the shards of replaced versions. These shards stay in the folder for the runs that still read them."""
    names = versions.read_record(location).get("replaced", {})
    kept = [name for name, _ in location.join(manifest.VERSIONS).files() if name in names] if names else []
    return {path for name in kept for path in manifest.read_version(location, name).paths}


def _check_listed(location: Location, listed: dict[str, int], sizes: dict[str, int]) -> None:
    for path, expected in listed.items():
        if sizes.get(path) != expected:
            actual = f"{sizes[path]:,} bytes" if path in sizes else "missing"
            raise DataError(
                f"{location.join(path)}: expected {expected:,} bytes, found {actual}. Restore the file, and write "
                "new data to a file with a new name"
            )


def _extend(before: Manifest, paths: list[str]) -> Manifest:
    log.info("%s: reading the footers of %d new shards", before.location, len(paths))
    column = "tokens" if before.kind == "tokens" else None
    read = partial(manifest.read_footer, before.location, token_column=column, vocab_size=before.meta.get("vocab_size"))
    shards = ShardCollector()
    with device_threads.pool(READERS) as pool:
        for path, rows in zip(paths, pool.map(read, paths), strict=True):
            if not rows:
                raise DataError(f"{before.location.join(path)}: has no row group. Remove the file")
            shards.add(row_groups.listed(rows))  # this reads no data, so `content` stays unknown
    added = in_memory(shards.rows())
    manifest.keep(before)
    return manifest.write(before.location, pa.concat_tables([before.chunks, added]), _meta(before.meta, added))


def _meta(before: dict[str, Any], added: pa.Table) -> dict[str, Any]:
    """Updates the metadata with the counts in the footers. Removes entries whose new value can't be computed from footers."""
    meta = {k: v for k, v in before.items() if k not in NOT_IN_FOOTERS}
    if "documents" in meta:  # each document is one row
        meta["documents"] += int(added["rows"].to_numpy().sum())
    return meta
