"""`heliostat prepare PIPELINE.yaml`: raw data to shards and a manifest, once; a rerun with nothing new does nothing.

A pipeline is a class named by the YAML's `pipeline` key (`pipelines.text:TextPipeline`). It subclasses `Pipeline`, which
is the schema of the YAML's other keys, and says what it reads and how it writes. What holds here for every pipeline:

- everything cheap is checked before Ray starts: the keys, the inputs, the output's store;
- the dataset exists only when it is complete: the old manifest is removed first and the new one is written last, so an
  interrupted run leaves a folder that `manifest.read` refuses;
- a finished dataset of the same configuration and input is kept (`up_to_date`), unless `force` is given;
- the digest does not depend on where the input and output lie or when they were written. Those facts are kept in
  `prepared.json`, beside the manifest, which only this module reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from heliostat import workspace
from heliostat.cluster.connect import connect
from heliostat.data import collection, manifest
from heliostat.data.manifest import SHARDS
from heliostat.errors import ConfigError, DataError, HeliostatError, StorageError, innermost
from heliostat.schema import Strict, apply, read_yaml, validate
from heliostat.storage import Location

log = logging.getLogger(__name__)

RECORD = "prepared.json"
CPUS = 4  # logical: the tasks wait for storage much of the time


@dataclass(frozen=True)
class InputFile:
    """One file of the input; `path` is relative to the input's root, `modified` in nanoseconds since 1970."""

    path: str
    bytes: int
    modified: int


class Pipeline(Strict):
    """Base of all pipelines: a validated YAML that knows how to become a dataset. Subclasses add keys and the methods."""

    name: str = Field(min_length=1)
    output: str = Field(min_length=1)
    labels: dict[str, str] = {}  # of the nodes that may do the work (Ray's node labels); none: any node

    def check(self) -> None:
        """Raises ConfigError for whatever can be found wrong without Ray and without reading the data."""
        raise NotImplementedError

    def inputs(self) -> list[InputFile]:
        """What is to be read, sorted by path; ConfigError if that is nothing."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """The part of the configuration that shapes the data: everything but the places."""
        return self.model_dump(mode="json", exclude={"input", "output", "labels"})

    def write(self, output: Location, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Runs on Ray: writes everything but the manifest, and returns its rows and metadata (with `kind`)."""
        raise NotImplementedError


def place(uri: str) -> Location:
    """The location, with a relative path taken from the workspace."""
    return Location(uri).absolute(workspace.root())


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load(path: Path, settings: list[str]) -> tuple[str, Pipeline]:
    """The import path of the pipeline and the validated pipeline; ConfigError names every wrong key."""
    path = path if path.is_absolute() else workspace.root() / path
    raw = apply(read_yaml(path), settings)
    target = raw.pop("pipeline", None)
    if not isinstance(target, str):
        raise ConfigError(f"{path}: pipeline: {target!r} must name a class, such as pipelines.text:TextPipeline")
    cls = workspace.import_path(f"{path}: pipeline", target)
    if not (isinstance(cls, type) and issubclass(cls, Pipeline)):
        raise ConfigError(f"{path}: pipeline: {target!r} must be a subclass of heliostat.prepare.Pipeline")
    return target, validate(cls, raw, str(path))


def prepare(path: Path, settings: list[str], force: bool = False) -> dict[str, Any]:
    """Makes the dataset that the pipeline YAML describes, or finds it up to date; returns the report as JSON values."""
    start = time.monotonic()
    target, pipeline = load(path, settings)
    output = place(pipeline.output)
    _check_output(output)
    pipeline.check()
    inputs = pipeline.inputs()
    config = sha256_json({"pipeline": target, **pipeline.identity()})
    listing = sha256_json([(f.path, f.bytes) for f in inputs])
    record = {"config": config, "input": sha256_json([(f.path, f.bytes, f.modified) for f in inputs])}

    if not force and (done := _finished(output, record)):
        log.info("%s is up to date", output)
        return _report(done, time.monotonic() - start, up_to_date=True)

    connect(cpus=CPUS)
    _keep_to(pipeline.labels)
    for part in (manifest.FILE, manifest.VERSIONS, RECORD, SHARDS):  # the manifest first: without it there is no dataset
        output.join(part).delete()
    collection.clear(output)
    try:
        rows, meta = pipeline.write(output, inputs)
    except HeliostatError:
        raise
    except Exception as e:  # Ray wraps what a task raised; ours are meant for the person
        cause = innermost(e)
        if cause is None:
            raise
        raise type(cause)(str(cause)) from e
    if not rows:
        raise DataError(f"{pipeline.name}: nothing is left of {len(inputs)} files; dropped: {meta.get('dropped')}")
    output.join(RECORD).write(json.dumps(record, indent=1).encode())
    write = collection.write if "parts" in meta else manifest.write
    made = write(output, rows, {**meta, "name": pipeline.name, "config": config, "listing": listing})
    return _report(made, time.monotonic() - start, up_to_date=False)


def _keep_to(labels: dict[str, str]) -> None:
    """Ray Data's tasks run on nodes that carry the labels, and on no others."""
    import ray.data

    ray.data.DataContext.get_current().execution_options.label_selector = labels or None


def _check_output(output: Location) -> None:
    """ConfigError or StorageError if nothing could be written there."""
    try:
        output.probe()
    except StorageError as e:
        raise StorageError(f"output: {e}") from e
    if output.is_s3:
        return
    nearest = Path(output.path)
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"output: {output}: {nearest} is not a folder that can be written to")


def _finished(output: Location, record: dict[str, str]) -> manifest.Manifest | None:
    """The dataset at `output`, if it is complete and was made from exactly this."""
    try:
        if json.loads(output.join(RECORD).read()) != record:
            return None
        found = manifest.read(output)
    except (FileNotFoundError, DataError, ValueError):
        return None
    sizes = dict(output.files())
    if any(sizes.get(path) != size for path, size in zip(*_columns(found, "path", "file_bytes"), strict=True)):
        log.warning("%s: shards are missing or cut; preparing it again", output)
        return None
    return found


def _columns(found: manifest.Manifest, *names: str) -> list[list[Any]]:
    return [found.chunks[name].to_pylist() for name in names]


def _report(made: manifest.Manifest, seconds: float, up_to_date: bool) -> dict[str, Any]:
    meta = made.meta
    return {
        "dataset": str(made.location),
        "digest": made.digest,
        "kind": made.kind,
        "documents": meta.get("documents", made.rows),
        "tokens": made.tokens,
        "shards": len(set(made.chunks["path"].to_pylist())),
        "chunks": made.chunks.num_rows,
        "dropped": meta.get("dropped", {}),
        "duplicates": meta.get("duplicates", 0),
        "vocab_size": meta.get("vocab_size"),
        "seconds": round(seconds, 2),
        "up_to_date": up_to_date,
    }
