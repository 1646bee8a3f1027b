"""Combines datasets whose samples must not share a batch into a collection, for example images of different sizes.

`prepare` writes a collection. Each part is a complete dataset in its own folder, with its own manifest. The collection's
manifest lists the row groups of all parts, so its digest identifies the whole collection.

A job contains the collection's path. `expand` replaces the collection with its parts, and divides the collection's weight among
the parts. So an epoch of the collection is an epoch of every part. All samples of a virtual rank in a step then come from one
part (`Shape.unit`). The order stays exact, and independent of the number of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.config.sections import Source
from heliostat.config.spec import Job
from heliostat.data import manifest, versions
from heliostat.data.dataset import DataPlan
from heliostat.data.manifest import Manifest
from heliostat.data.manifest_table import RowGroups, Rows, in_order, total
from heliostat.data.stored_rows import StoredRows
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location

KIND = "collection"
OF_ALL = ("parts", "curation", "also", "forgotten")  # metadata of the whole collection: only its own manifest has these keys


def write(location: Location, rows: Rows, meta: Mapping[str, Any]) -> Manifest:
    """Writes the manifests of all parts, then the collection's manifest. A part without rows is left out.

    `rows`: manifest rows, with paths `PART/shards/...`; `meta["parts"]`: the metadata that differs between parts, by part.
    """
    chunks = in_order(rows)
    rows_of, digests, common = {}, {}, {k: v for k, v in meta.items() if k not in OF_ALL}
    for name, own in meta["parts"].items():
        if not len(inside := _inside(chunks, f"{name}/")):
            continue
        special = {"name": f"{meta['name']}-{name}", "documents": total(inside, "rows"), "dropped": {}}
        version = manifest.write(location.join(name), inside, {**common, **special, **own})
        rows_of[name], digests[name] = version.rows, version.digest
    return manifest.write(location, chunks, {**meta, "kind": KIND, "parts": rows_of, "digests": digests})


def _inside(chunks: RowGroups, prefix: str) -> RowGroups:
    """Returns the rows whose path has a prefix, with paths without the prefix."""
    if isinstance(chunks, StoredRows):
        return chunks.inside(prefix)
    paths = chunks["path"].chunk(0)
    rest = pa.DictionaryArray.from_arrays(paths.indices, pc.utf8_slice_codeunits(paths.dictionary, len(prefix)))
    rows = pc.starts_with(paths.dictionary, prefix).take(paths.indices)
    return chunks.set_column(chunks.schema.get_field_index("path"), "path", rest).filter(rows)


def _meta(place: Location, recorded: DataPlan | None) -> tuple[dict[str, Any], bool]:
    """Returns a dataset's metadata, and whether this is the version that the run recorded.

    Returns ({}, False) if there is no dataset.

    A `prepare` may have replaced a collection since the run began. So this function returns the version whose parts the run
    trains on, or the newest version if no version matches.
    """
    newest = manifest.read(place) if place.join(manifest.FILE).exists() else None
    if newest is None or newest.kind != KIND or recorded is None:
        return newest.meta if newest else {}, False
    trained = dict(zip(recorded.uris, recorded.digests, strict=True))
    for version in itertools.chain([newest], (version for _, version in versions.all_versions(place, newest))):
        parts = version.meta.get("digests", {})
        if parts and all(trained.get(place.join(name).uri) == digest for name, digest in parts.items()):
            return version.meta, True
    return newest.meta, False


def expand(job: Job, recorded: DataPlan | None = None) -> Job:
    """Replaces each collection among the job's sources with its parts. Without a collection, returns the job unchanged.

    `recorded`: the data plan of a resumed run, which selects the version of each collection. Raises ConfigError if a part's
    digest differs from the one that the collection lists, or if the job sets `data.sequence_length` with a collection.
    """
    expanded: list[tuple[Source, list[tuple[str, float]]]] = []
    for source in job.data.sources:
        place = Location(source.path)
        meta, as_recorded = _meta(place, recorded)
        if meta.get("kind") != KIND:
            expanded.append((source, [(source.path, 1.0)]))
            continue
        for name, digest in meta.get("digests", {}).items():
            if not as_recorded and (now := manifest.read(place.join(name)).digest) != digest:
                raise ConfigError(
                    f"data.sources: {source.path}: part {name} has digest {now[:12]}, but the collection lists "
                    f"{digest[:12]}. A `heliostat data prepare` of the collection is running, or was interrupted. "
                    "Run `heliostat data prepare` again"
                )
        total = sum(meta["parts"].values())
        expanded.append((source, [(place.join(name).uri, rows / total) for name, rows in sorted(meta["parts"].items())]))
    if all(parts == [(source.path, 1.0)] for source, parts in expanded):
        return job
    if job.data.sequence_length:
        raise ConfigError("data.sources: a collection contains images. Remove data.sequence_length")

    def shares(weights: list[float]) -> list[float]:
        return [_round(w * share) for w, (_, parts) in zip(weights, expanded, strict=True) for _, share in parts]

    paths = [(source, path) for source, parts in expanded for path, _ in parts]
    weights = shares([s.weight for s in job.data.sources])
    sources = [
        Source(path=path, weight=weight, max_epochs=source.max_epochs)
        for (source, path), weight in zip(paths, weights, strict=True)
    ]
    schedule = [change.model_copy(update={"weights": shares(change.weights)}) for change in job.data.mix_schedule]
    data = job.data.model_copy(update={"sources": sources, "mix_schedule": schedule, "one_source_batches": True})
    return job.model_copy(update={"data": data})


def _round(weight: float) -> float:
    """Rounds a weight to four digits. With more digits, the sequence in which sources are mixed would repeat only after too
    many samples."""
    return max(round(weight, 4), 0.0001) if weight else 0.0
