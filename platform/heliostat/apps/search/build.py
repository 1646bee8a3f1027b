"""Builds an index of a prepared text dataset, on Ray: `heliostat search index DATASET --out INDEX`.

    INDEX/passages.lance     passages with their positions, embeddings, and full-text index; each build adds a version
    INDEX/files/ends-*       the dataset's record of its documents and their columns, and the records of replaced versions
    INDEX/index.json         written last: dataset, embedder, settings, counts, and the version that they describe
    INDEX/work               results of finished units, by the keys of their inputs

Each unit (row groups of a shard) is one task. In a version of the table, each unit's fragments are listed exactly once. If a
build is killed, the next command continues after the last finished unit.

For a new version of the dataset, only units of new shards run. If a text already has an embedding, this embedding is reused.
Documents that aren't in the new dataset aren't in the table's new version.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from heliostat import extras
from heliostat.apps.search import table
from heliostat.apps.search.tasks import IndexPlan, IndexSettings, index_unit
from heliostat.apps.search.units import IndexUnit, open_text, units
from heliostat.curation import recording
from heliostat.data.infilling import Markers
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.inference.batch.run import claim, flow_on_ray, model_digest, origin
from heliostat.recipes import exported
from heliostat.recipes.conformance import is_language_model
from heliostat.recipes.text import sentence_folder
from heliostat.storage import lease
from heliostat.storage.locations import Location
from heliostat.tasks import shipping
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key

if TYPE_CHECKING:
    import lance

log = logging.getLogger(__name__)

UNITS = 256  # approximate number of units of a dataset
LEAST, MOST = 1 << 16, 1 << 22  # limits of a unit's size, in tokens
COUNTS = ("documents", "passages", "empty", "embedded", "truncated", "unembedded")


def index_documents(
    dataset: str, output: str, settings: IndexSettings, embedder: Path | None = None, batch: int = 16, workers: int = 2,
    quiet: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Builds an index, or updates it to the dataset's version.

    Returns the values of `index.json`, and as `new` the number of units that ran. Raises ConfigError, before anything starts, in
    these cases:

    - the dataset contains no text
    - the embedder doesn't embed text
    - the output folder contains something other than an index
    - another command is building this index
    """
    require()
    prepared, place = open_text(Location(dataset)), Location(output)
    about = describe(embedder) if embedder else None
    place.probe()
    claim(place, {"embedder": about and about["digest"], **settings.model_dump()}, "an index", "index of documents")
    with lease.take(place, "built", "Wait until this process ends, or stop this process", field="--out") as lease_:
        before = what_was(place)
        if before and before.record["dataset"]["digest"] == prepared.digest:
            return {**before.record, "added": 0, "deleted": 0, "new": 0}
        import torch

        gpus = torch.cuda.device_count() if embedder else 0
        with flow_on_ray(place, f"indexing {dataset}", workers, gpus, quiet) as flow:
            return build(flow, prepared, place, settings, about, before, batch, lease_.fence.check)


@dataclass(frozen=True)
class Before:
    """Holds the previous version of an index: the content of `index.json`, and the keys of the documents (int64, sorted)."""

    record: table.IndexRecord
    keys: np.ndarray


def what_was(place: Location) -> Before | None:
    """Reads the previous version of an index. Returns None if there is no previous version. If a part of the previous version is
    missing, logs a warning and returns None."""
    if not place.join(table.RECORD).exists():
        return None
    known = table.read_record(place)
    try:
        return Before(known, table.document_keys(place, table.open_version(place, known["version"])))
    except DataError as e:
        log.warning("%s. Building the index again", e)
        return None


def require() -> None:
    """Raises MissingExtraError unless Lance is installed."""
    extras.require("retrieval", "lance", what="an index of documents")


def describe(embedder: Path) -> dict[str, Any]:
    """Describes an embedder: folder, digest, origin, and `dims`, the size of its embeddings.

    Raises ConfigError if the model doesn't embed text.
    """
    from transformers import AutoConfig

    if sentence_folder.read(embedder) is None and not is_language_model(exported.read(embedder).recipe):
        raise ConfigError(f"--embedder: {embedder}: is neither a text embedder nor a language model. Pass another model")
    with exported.using(embedder):
        dims = AutoConfig.from_pretrained(embedder).get_text_config().hidden_size
    return {"folder": str(embedder), "digest": model_digest(embedder), "dims": dims, **origin(embedder)}


def build(
    flow: Flow, prepared: Manifest, place: Location, settings: IndexSettings, embedder: dict[str, Any] | None,
    before: Before | None, batch: int, before_commit: Callable[[], None] = lambda: None,
) -> dict[str, object]:  # fmt: skip
    """Runs the tasks, commits their passages as a version of the table, and writes `index.json`. Returns the values of
    `index.json`.

    `before_commit`: raises an error if another command has taken over the index.
    """
    began = time.time()
    records = _passages(flow, prepared, place, settings, embedder, before, batch)
    fragments = [fragment for record in records for fragment in record["fragments"]]
    if not fragments:
        raise DataError(f"{prepared.location}: the dataset's documents contain no text. Pass another dataset")
    flow.close()
    before_commit()
    columns = table.schema(embedder["dims"] if embedder else None)
    version = table.build_indices(table.commit(place, columns, fragments), place)
    new, shards, ends = flow.done.get("passages", 0), set(prepared.paths), _ends(prepared, place)
    kept, gone = _replaced(place, ends, before)
    record: dict[str, object] = {
        "dataset": {"location": str(prepared.location), "digest": prepared.digest, "shards": len(shards)},
        "embedder": embedder,
        "settings": settings.model_dump(),
        **{name: sum(record.get(name, 0) for record in records) for name in COUNTS},
        **_changes(place, version, before),
        "version": version.version,
        "ends": ends,
        "replaced": kept,
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(sum(record["seconds"] for record in records), 1),
    }
    place.join(table.RECORD).write(json.dumps(record, indent=1).encode())
    shipping.withdraw(flow.work.spill)
    for path in gone:
        place.join(path).delete()
    table.clean(version)
    return {**record, "new": new}


def _passages(
    flow: Flow, prepared: Manifest, place: Location, settings: IndexSettings, embedder: dict[str, Any] | None,
    before: Before | None, batch: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs a task for each unit; returns the tasks' records in the dataset's order."""
    target = flow.work.begin(max(LEAST, min(MOST, prepared.tokens // UNITS)))
    definition, known = prepared.file("tokenizer.json").read().decode(), embedder or {}
    plan = IndexPlan(
        prepared.location.uri, place.uri, definition, prepared.meta.get("end_of_document"), settings,
        shipping.describe("--embedder", known["folder"]) if embedder else None, known.get("digest", ""), known.get("dims"), batch,
        before.record["version"] if before and embedder else None, Markers.of(prepared.meta),
    )  # fmt: skip
    shared = {"plan": flow.share(plan)}
    rearranged = [astuple(plan.markers)] if plan.markers else []
    follows = key(definition, plan.end, settings.model_dump(), known.get("digest"), *rearranged)

    def task(unit: IndexUnit) -> Task:
        return Task(key("passages", follows, unit.identity), {"unit": unit}, shared, unit.bytes, can_repeat=False)

    present = {name for name, _ in place.join(table.NAME).files()}

    def whole(record: dict[str, Any]) -> bool:
        return all(name in present for fragment in record["fragments"] for name in table.files(fragment))

    return flow.all("passages", index_unit, (task(unit) for unit in units(prepared, target)), valid=whole, pooled=bool(embedder))


def _changes(place: Location, version: lance.LanceDataset, before: Before | None) -> dict[str, int]:
    """Counts the documents that were added, deleted, and kept since the previous version. Only documents with at least one
    passage count."""
    now, was = table.document_keys(place, version), before.keys if before else np.zeros(0, np.int64)
    kept = len(np.intersect1d(now, was, assume_unique=True))
    return {"added": len(now) - kept, "deleted": len(was) - kept, "kept": kept}


def _ends(prepared: Manifest, place: Location) -> list[list[str]]:
    """Copies the files in which the dataset records its documents, if the dataset has such files. Returns the list of these files
    from the manifest."""
    listed = prepared.meta.get("curation", {}).get("ends", [])
    present = {f"files/{name}" for name, _ in place.join("files").files()}
    if listed and (limits := recording.limits(recording.every_of(prepared))):
        log.warning("%s: %s. Answers show columns, such as URLs, only for these documents", prepared.location, limits)
    for _, path in listed:
        if path not in present:  # the name contains a digest, so an existing file has the same content
            place.join(path).write(prepared.location.join(path).read())
    return listed


def _replaced(place: Location, ends: list[list[str]], before: Before | None) -> tuple[dict[str, float], list[str]]:
    """Returns two lists of document records of earlier versions: the records to keep, with their time of replacement, and the
    records to delete.

    The time is in Unix seconds. A record is kept for `table.KEEP`, for readers of its version. The passages of that version are
    kept for the same time.
    """
    now, known = time.time(), before.record.get("replaced", {}) if before else {}
    others = {f"files/{name}" for name, _ in place.join("files").files()} - {path for _, path in ends}
    since = {path: known.get(path, now) for path in sorted(others)}
    over = [path for path, when in since.items() if now - when >= table.KEEP.total_seconds()]
    return {path: when for path, when in since.items() if path not in over}, over
