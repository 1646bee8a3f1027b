"""Makes a copy of a dataset without one document, image, or conversation. It is removed from its shard, from the record of how
the dataset was made, and from the manifest.

The other shards are copied unchanged. A training run that has started continues with the old dataset; a new run uses the new one.
Two traces of the document remain: a tokenizer may have been trained on it, and it may have influenced which duplicate stayed. In
a collection, the parts' manifests change too.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.curation import reasons, recording
from heliostat.curation.conversations import reading, removing
from heliostat.curation.images import tasks as images
from heliostat.curation.text import tokens
from heliostat.data import collection, documents, infilling, manifest, row_groups, versions
from heliostat.data.conversations import FACT
from heliostat.data.infilling import COUNTS
from heliostat.data.manifest import FILES, UNCOVERED, Manifest, kept_path
from heliostat.data.manifest_table import in_memory
from heliostat.data.row_groups import ListedShard, ShardCollector
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location

COPIERS = 4  # threads, each with a shard in memory
LISTED = 10  # candidates that an error lists
OF_BEFORE = ("digest", "digests", "unigram_entropy", "cuts")  # facts copied from the old dataset; others are counted again
OF_GROUPS = ("groups", "documents")  # counts of related documents, copied from the old dataset
SAME = "duplicate"  # the drop reason of documents with the same text as a kept document


def one(rows: list[dict[str, Any]], option: str) -> tuple[str, list[dict[str, Any]]]:
    """Returns the id of the document to remove, and the rows of all documents with the same text. If documents with different
    texts match, raises a ConfigError that lists candidates."""
    targets = dict.fromkeys(row["detail"] if row["reason"] == SAME else row["id"] for row in rows)
    if len(targets) > 1:
        lines = [f"{row['id']} ({row['stage']}: {row['reason']})" for row in rows[:LISTED]]
        more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
        raise ConfigError(f"{option}: {len(targets)} documents match: {', '.join(lines)}{more}. Choose one with --id")
    return next(iter(targets)), rows


def check(dataset: Manifest, output: Location) -> None:
    """Checks that a document can be removed, and that the new dataset can be written to `output`; ConfigError if not."""
    if limits := recording.limits(recording.every_of(dataset)):
        raise ConfigError(
            f"DATASET: {dataset.location}: {limits[0].lower()}{limits[1:]}, so heliostat can't find every copy of a document. "
            "Prepare the dataset with record_documents: all"
        )
    here, target = dataset.location.path.rstrip("/"), output.path.rstrip("/")
    if f"{target}/".startswith(f"{here}/") or f"{here}/".startswith(f"{target}/"):
        raise ConfigError(f"--out: {output} and {dataset.location} overlap. Pass another folder")
    output.probe()
    foreign = [name for name, _ in output.files() if not versions.OURS.fullmatch(name)]
    if foreign:
        raise ConfigError(f"--out: {output}: the folder isn't empty (it contains {min(foreign)!r}). Pass another folder")


def forget(dataset: Manifest, id: str, document_rows: list[dict[str, Any]], output: Location) -> Manifest:
    """Copies the dataset to `output`, without the document `id` and its duplicates (`document_rows`). Returns the new
    manifest."""
    gone = {id, *(row["id"] for row in document_rows)}
    kept = [row for row in reasons.end_of(dataset, id) if row["reason"] == "kept"]
    path = documents.current(dataset, kept[0]["detail"]) if kept else None
    meta = {k: v for k, v in dataset.meta.items() if k not in OF_BEFORE}
    chunks, removed = dataset.chunks, {"documents": 0, "bytes": 0, "tokens": 0}
    if path:
        rest, removed = _shard(dataset, path, kept[0], output)
        shards = ShardCollector()
        if rest is not None:
            shards.add(rest)
        chunks = pa.concat_tables([chunks.filter(pc.not_equal(chunks["path"], path)), in_memory(shards.rows())])
        if not len(chunks):
            raise ConfigError(
                f"{dataset.location}: {id!r} is the dataset's only document, and a dataset can't be empty. "
                "Delete the dataset instead"
            )
    meta |= {name: meta[name] - removed[name] for name in ("documents", "bytes") if name in meta}
    if "together" in meta:
        meta["together"] = {name: value for name, value in meta["together"].items() if name not in OF_GROUPS}
    if facts := meta.get(FACT):
        meta[FACT] = {**facts, "counts": removing.counts(facts, removed)}
    if COUNTS in meta:
        meta[COUNTS] = {name: count - removed.get(f"{COUNTS}.{name}", 0) for name, count in meta[COUNTS].items()}
    record = _record(dataset, gone, removed, output)
    parts = dataset.meta.get("parts", {})
    beside = [path for file in meta.get("files", {}).values() for path in (file, *(f"{part}/{file}" for part in parts))]
    _copy(dataset.location, output, [*dict.fromkeys(chunks["path"].to_pylist()), *beside, *record["also"]])
    before = dataset.meta.get("forgotten", [])
    meta |= {**record, "forgotten": [*before, {"digest": dataset.digest, "ids": sorted(gone)}]}
    if parts:
        metas = {name: manifest.read(dataset.location.join(name)).meta for name in parts}
        own = {name: {k: v for k, v in part.items() if k not in meta and k not in OF_BEFORE} for name, part in metas.items()}
        kind = next(iter(metas.values()))["kind"]
        result = collection.write(output, chunks, {**meta, "kind": kind, "parts": own})
    else:
        result = manifest.write(output, chunks, meta)
    for name in UNCOVERED:
        source = dataset.location.join(kept_path(dataset.digest, name))
        if source.exists():
            output.join(kept_path(result.digest, name)).write(source.read())
    versions.publish(output, result)
    return result


def _shard(dataset: Manifest, path: str, end: dict[str, Any], output: Location) -> tuple[ListedShard | None, dict[str, int]]:
    """Rewrites a shard without one document. `end`: the document's outcome, as a row of `reasons.END`. Returns the new shard,
    None if it is empty, and the counts (documents, bytes, tokens, and more) of the removed document."""
    place, id = dataset.location.join(path), end["id"]
    if FACT in dataset.meta:
        with place.open() as source:
            data, rows = place.attempt(lambda: removing.without(pq.ParquetFile(source), id))
        return _stored(output, path, data, None), {"documents": 1, "rows": rows, **end["columns"][reading.COUNTS]}
    if dataset.kind != "tokens":
        with place.open() as source:
            data, bytes = place.attempt(lambda: images.without(pq.ParquetFile(source), id))
        return _stored(output, path, data, None), {"documents": 1, "bytes": bytes, "tokens": 0}
    with place.open() as source:
        data, ids = place.attempt(lambda: tokens.without(pq.ParquetFile(source), {id}))
    tokenizer = tokens.load(dataset.file("tokenizer.json").read().decode())
    markers = infilling.Markers.of(dataset.meta)
    texts = tokenizer.decode_batch(infilling.texts(ids, dataset.fact("end_of_document"), markers), skip_special_tokens=False)
    removed = {"documents": 1, "bytes": sum(len(text.encode()) for text in texts), "tokens": len(ids)}
    removed |= {f"{COUNTS}.{name}": count for name, count in (markers.counted([ids]) if markers else {}).items()}
    return _stored(output, path, data, "tokens"), removed


def _stored(output: Location, path: str, data: bytes | None, column: str | None) -> ListedShard | None:
    """Stores a shard in place of the shard at `path`. Returns None for an empty shard."""
    if data is None:
        return None
    return row_groups.written(output, versions.store(output, f"{path.rpartition('/')[0]}/", data, ".parquet"), data, column)


def _record(dataset: Manifest, gone: set[str], removed: dict[str, int], output: Location) -> dict[str, Any]:
    """Rewrites the record of how the dataset was made, without the removed documents' texts, columns, and hashes. Returns the
    manifest's metadata about this record."""
    funnel = reasons.funnel(dataset)
    for part in funnel.values():
        for rule, examples in part.get("examples", {}).items():
            part["examples"][rule] = [e for e in examples if e[1] not in gone]
    last = funnel["shard"]
    last["kept"] -= removed["documents"]
    last["kept_bytes"] -= removed["bytes"]
    if facts := dataset.meta.get(FACT):
        last["counts"] = removing.counts(facts, removed)
    elif "tokens" in last["counts"]:
        last["counts"]["tokens"] -= removed["tokens"]
    if removed["documents"]:
        last["dropped"]["forgotten"] = last["dropped"].get("forgotten", 0) + removed["documents"]
    path = versions.store(output, f"{FILES}/funnel-", json.dumps(funnel).encode(), ".json")
    ends = reasons.rewritten(dataset, gone, {"stage": "forget", "reason": "forgotten", "detail": dataset.digest[:12]}, output)
    return {"curation": {"funnel": path, "ends": ends}, "also": sorted({path, *(name for _, name in ends)})}


def _copy(source: Location, output: Location, paths: list[str]) -> None:
    """Copies the files that don't exist at `output` yet. A file's name identifies its content, so existing files are the same."""
    present = {name for name, _ in output.files()}
    with ThreadPoolExecutor(COPIERS) as pool:
        list(pool.map(lambda path: output.join(path).write(source.join(path).read()), [p for p in paths if p not in present]))
