"""Prepares raw data as shards and a manifest: `heliostat data prepare PIPELINE.yaml`. A rerun without changes does nothing.

The YAML's `pipeline` key selects the pipeline's class (`heliostat.pipelines:TextPipeline`), a subclass of `Pipeline`. The class
is the schema of the YAML's other keys, and implements reading and writing. Guarantees for every pipeline:

- cheap checks come before Ray starts: the keys, the inputs, the output's store;
- the dataset exists only when it is complete: a new version is written next to the old one, and its manifest last. A run that
  fails or is interrupted leaves the old version unchanged, and removes its own files;
- the replaced version stays for `keep_days`, for the runs that read it (`heliostat.data.versions`);
- a folder with other files is rejected, and heliostat removes only its own files;
- a finished dataset of the same configuration and input is kept (`up_to_date`), unless `force` is given;
- the digest doesn't depend on the locations of input and output, or on the time of writing. `prepared.json`, next to the
  manifest, records these locations and this time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from pyarrow.fs import FileType
from pydantic import Field, PrivateAttr

from heliostat.cluster import private_ray
from heliostat.cluster.connect import connect
from heliostat.config import workspace
from heliostat.config.file_kinds import require_kind
from heliostat.curation import hub, machine_code, recording
from heliostat.curation.leftovers import remove_old_samples, sample_folder
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare_report import in_words
from heliostat.curation.watching import PipelineWatch
from heliostat.data import collection, conversations, manifest, versions
from heliostat.data.infilling import COUNTS
from heliostat.data.manifest import Manifest
from heliostat.data.manifest_table import ERRORS, HUB, Rows
from heliostat.errors import AccessError, ConfigError, DataError, HeliostatError, StorageError, unwrapped
from heliostat.schema import Float, Strict, absent, apply, read_yaml, validate
from heliostat.storage.locations import Location
from heliostat.terminal import console
from heliostat.text import plural

log = logging.getLogger(__name__)

LISTED = "quarantine.parquet"  # the newest version's list of dropped documents, with the reasons
DAY_S = 86_400
CPUS = 4  # minimum of logical CPUs: the tasks often wait for storage


@dataclass(frozen=True, slots=True)
class InputFile:
    """Describes one file of the input; `path` is relative to the input's root, `modified` in nanoseconds since 1970.

    `etag`: the ETag of an object, if its store has one.
    """

    path: str
    bytes: int
    modified: int
    etag: str = ""

    @property
    def part(self) -> FilePart:
        """Returns a part that covers the complete file."""
        return FilePart(self.path, self.bytes, self.modified, etag=self.etag)


class Pipeline(Strict):
    """Defines a pipeline: a validated YAML that can produce a dataset. Subclasses add keys and implement the methods."""

    later: ClassVar[frozenset[str]] = frozenset()  # newer keys: datasets made without them are up to date
    beside: ClassVar[frozenset[str]] = frozenset()  # keys that don't affect the data
    ray_data: ClassVar[bool] = True  # whether `write` uses Ray Data, which takes a second to import

    _hub: dict[str, str] = PrivateAttr(default_factory=dict)  # pinned Hub names (with commits) by key
    _written_by: dict[str, Any] | None = PrivateAttr(default=None)  # the result of `written_by`

    name: str = Field(min_length=1)
    """Name of the dataset, recorded in its manifest."""
    output: str = Field(min_length=1)
    """Folder of the dataset, or `s3://bucket/prefix`. This folder must be outside the input."""
    labels: dict[str, str] = {}
    """Ray label selectors of the nodes that do the work: `v`, `!v`, `in(v, w)` or `!in(v, w)`. Empty: any node."""
    keep_days: Float = Field(7.0, ge=0)
    """Days to keep a replaced version for the runs that read it. See docs/data/versions.md"""

    @abstractmethod
    def check(self) -> None:
        """Checks everything that can be checked without Ray and without reading the data; raises ConfigError for the first
        problem."""

    @abstractmethod
    def inputs(self) -> list[InputFile]:
        """Lists the files to read, sorted by path; ConfigError if there are none."""

    def written_by(self, inputs: list[InputFile]) -> dict[str, Any] | None:
        """Returns facts about the model that generated the input (`heliostat model infer`), and the source of the model. Returns
        None for other inputs."""
        return None

    def identity(self) -> dict[str, Any]:
        """Returns the part of the configuration that determines the data: all keys, except the locations and those newer keys
        that have their default values."""
        usual = {key for key in self.later if getattr(self, key) == type(self).model_fields[key].default}
        return self.model_dump(mode="json", exclude={"input", "output", "labels", "keep_days", *self.beside, *usual})

    @abstractmethod
    def write(self, output: Location, inputs: list[InputFile]) -> tuple[Rows, dict[str, Any]]:
        """Writes everything but the manifest, on Ray. Returns the manifest's rows (stored rows, a table, or a list of mappings,
        with the columns of `manifest.SCHEMA`) and its metadata, which includes `kind`.

        Files are named after their content (`versions.store`), because the folder may also contain an older version. In the
        metadata, `files` lists the files that get a second, plain name when they are published. `listed`: the paths of the files
        that list the dropped documents.
        """

    def predict(self, folder: Location, inputs: list[InputFile], fraction: float) -> dict[str, Any]:
        """Prepares a share of the input in a folder, on Ray, and returns the prediction for the whole input, as JSON values."""
        raise ConfigError(
            f"--sample: {type(self).__name__} doesn't support dry runs. Remove --sample, or use a text or image pipeline"
        )

    def watched(self, watch: PipelineWatch) -> None:
        """Sets the progress display that `write` and `predict` use."""

    def begin_anew(self) -> None:
        """Deletes the unfinished work of an earlier run, for `--force`."""

    def finish(self, dataset: Manifest) -> None:
        """Removes temporary files after the dataset is published. Writes the files that the dataset's digest doesn't cover."""


def place(uri: str, key: str) -> Location:
    """Resolves a pipeline key's URI to a location. A relative path is relative to the workspace."""
    try:
        return Location(uri).absolute(workspace.root())
    except ConfigError as e:
        raise ConfigError(f"{key}: {e}") from e


def sha256_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load(path: Path, settings: list[str]) -> tuple[str, Pipeline]:
    """Loads a pipeline file; returns the import path of its class, and the validated pipeline. If keys are wrong, raises a
    ConfigError that lists all of them."""
    name, path = path, path if path.is_absolute() else workspace.root() / path
    written = read_yaml(path)
    require_kind("pipeline", name, written)
    raw = apply(written, settings)
    if "pipeline" not in raw:
        raise ConfigError(f"{path}: {absent('pipeline', 'heliostat.pipelines:TextPipeline')}")
    target = raw.pop("pipeline")
    if not isinstance(target, str):
        raise ConfigError(f"{path}: pipeline: {target!r} isn't a class. Set a class, such as heliostat.pipelines:TextPipeline")
    cls = workspace.import_path(f"{path}: pipeline", target)
    if not (isinstance(cls, type) and issubclass(cls, Pipeline)):
        raise ConfigError(f"{path}: pipeline: {target!r} must be a subclass of heliostat.curation.prepare.Pipeline")
    for key, now in getattr(cls, "moved", {}).items():
        if key in raw:
            log.warning("%s: the key %s is now columns.%s. Rename the key", path, key, now)
    raw, pinned = hub.resolved(raw)
    pipeline = validate(cls, raw, str(path))
    pipeline._hub = pinned
    return target, pipeline


def prepare(path: Path, settings: list[str], force: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Prepares the dataset that the pipeline file describes, unless the dataset is up to date.

    Returns the report as JSON values. Shows the progress unless `quiet` is set.
    """
    start = time.monotonic()
    target, pipeline = load(path, settings)
    output = place(pipeline.output, "output")
    _check_output(output)
    pipeline.check()
    record = versions.read_record(output)
    inputs = pipeline.inputs()
    config = sha256_json({"pipeline": target, **pipeline.identity()})
    listing = sha256_json([(f.path, f.bytes) for f in inputs])
    wanted = {"config": config, "input": sha256_json([(f.path, f.bytes, f.modified) for f in inputs])}
    of_made = {k: record.get("made", record).get(k) for k in wanted}  # older records have these values at the top level
    if any(f.etag for f in inputs):
        wanted["etags"] = sha256_json([(f.path, f.etag) for f in inputs])
        of_made["etags"] = record.get("made", {}).get("etags", wanted["etags"])  # older records have no ETags
    if not force and of_made == wanted and (done := _finished(output)):
        log.info("%s is up to date", output)
        pruned = versions.prune(done, record, pipeline.keep_days * DAY_S) if record.get("replaced") else versions.NOTHING
        return _report(done, time.monotonic() - start, True, pruned, record.get("made", {}).get("written_by"))

    stages = {f"{number} {of['stage']}": of["version"] for number, of in enumerate(pipeline.identity().get("stages", []))}
    if why := changed(of_made, wanted, record.get("made", {}).get("stages"), stages):
        log.info("%s: preparing the dataset again, because %s", output, why)
    record, written_by = versions.claim(output, record), pipeline.written_by(inputs)
    pipeline._written_by = written_by
    if force:
        pipeline.begin_anew()
    before = set(versions.listing(output))
    try:
        _start_ray(pipeline)
        with PipelineWatch(console, f"preparing {pipeline.name}", quiet) as watch, unwrapped():
            pipeline.watched(watch)
            rows, meta = pipeline.write(output, inputs)
        if not len(rows):
            reasons = ", ".join(f"{n:,} {in_words(reason)}" for reason, n in sorted(meta.get("dropped", {}).items()))
            raise DataError(
                f"input: no document of {plural(len(inputs), 'file')} remains (dropped: {reasons}). Check `columns` and `stages`"
            )
        listed = meta.pop("listed", None) or []
        listed = [listed] if isinstance(listed, str) else listed
        versions.save_beside(output)
        record = {k: v for k, v in record.items() if k not in ("made", *wanted)}
        versions.write_record(output, record)  # written first: if publishing is interrupted, the dataset isn't up to date
        write = collection.write if "parts" in meta else manifest.write
        named = {"name": pipeline.name, "config": config, "listing": listing}
        dataset = write(output, rows, {**meta, **named, **({HUB: pipeline._hub} if pipeline._hub else {})})
    except BaseException as e:
        _undo(output, before, record, e)
        raise
    _list(output, listed)
    versions.publish(output, dataset)
    also = {"stages": stages, "written_by": written_by}
    record = versions.mark(output, dataset, record) | {"made": wanted | {k: v for k, v in also.items() if v}}
    versions.release(output, record)
    pipeline.finish(dataset)
    pruned = versions.prune(dataset, record, pipeline.keep_days * DAY_S)
    return _report(dataset, time.monotonic() - start, False, pruned, written_by)


def changed(known: dict[str, Any], wanted: dict[str, Any], before: dict[str, int] | None, stages: dict[str, int]) -> str:
    """Explains what has changed since the dataset was made. Returns "" if nothing has changed, or if there is no dataset.

    `before` and `stages`: versions of stages by `NUMBER NAME`; older records don't have them.
    """
    if known["config"] is None or known == wanted:
        return ""
    newer = [f"{name} has version {stages[name]}, formerly {was}" for name, was in (before or {}).items()
             if stages.get(name, was) != was]  # fmt: skip
    if newer:
        return f"the dataset's stages have new versions: {', '.join(newer)}"
    return (
        "the pipeline's keys, or the versions of its stages, have changed"
        if known["config"] != wanted["config"]
        else "the input has changed"
    )


def dry_run(path: Path, settings: list[str], fraction: float, quiet: bool = False) -> dict[str, Any]:
    """Prepares a sample of the input in a temporary folder, and predicts the result and cost for the whole input."""
    _, pipeline = load(path, settings)
    with sampling(pipeline, quiet) as (folder, inputs):
        return pipeline.predict(folder, inputs, fraction)


@contextmanager
def sampling(pipeline: Pipeline, quiet: bool) -> Iterator[tuple[Location, list[InputFile]]]:
    """Checks a pipeline and connects to Ray; yields a temporary folder next to the output, and the input's files."""
    output = place(pipeline.output, "output")
    _check_output(output)
    pipeline.check()
    inputs = pipeline.inputs()
    remove_old_samples(output)
    folder = sample_folder(output)
    _start_ray(pipeline)
    try:
        with PipelineWatch(console, f"preparing a sample of {pipeline.name}", quiet) as watch, unwrapped():
            pipeline.watched(watch)
            yield folder, inputs
    finally:
        folder.delete()


def _start_ray(pipeline: Pipeline) -> None:
    module = type(pipeline).__module__
    if any("numba" in stage.needs for stage in getattr(pipeline, "stages", ())) and machine_code.is_missing():
        log.info("compiling the text filters when the first task uses them: about 10 s, once per machine")
    modules = [module] if module.startswith("heliostat.") else []
    private_ray.ahead(0, [*(private_ray.TASKS if pipeline.ray_data else ()), *modules])
    connect(cpus=max(CPUS, os.cpu_count() or 1))
    if pipeline.ray_data:
        _keep_to(pipeline.labels)


def _undo(output: Location, before: set[str], record: dict[str, Any], error: BaseException) -> None:
    """Removes the files of this run that no version of the dataset uses. If removing these files fails, logs that a later run
    removes them."""
    log.warning("%s: %s; removing the files of this run. The dataset stays as it was before, and the next `heliostat data "
                "prepare` continues from the finished tasks", output,
                "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")  # fmt: skip
    try:
        needed = set[str]().union(*(versions.paths(version) for _, version in versions.all_versions(output)))
        versions.remove_all(output, sorted(set(versions.listing(output)) - before - needed))
        versions.release(output, record)
    except HeliostatError as e:
        log.warning("%s. The next `heliostat data prepare` removes this run's files", e)


def _list(output: Location, listed: list[str]) -> None:
    """Publishes the list of dropped documents under the name LISTED, as one file or as a folder of several files. Replaces an
    older list.

    The older list is replaced when the new list is complete. If a store has one list as a file and the other as a folder, the
    older list is deleted first. Some stores don't allow a file and a folder with the same name.
    """
    place = output.join(LISTED)
    ready = place if output.is_s3 else output.join(f".{LISTED}.new")
    kind = place.attempt(lambda: place.fs.get_file_info(place.path)).type
    if ready != place:
        ready.delete()
    elif kind != (FileType.File if len(listed) == 1 else FileType.Directory):
        place.delete()
    names = [""] if len(listed) == 1 else [f"{number:05d}.parquet" for number in range(len(listed))]
    for name, path in zip(names, listed, strict=True):
        (ready.join(name) if name else ready).write(output.join(path).read())
    if ready == place:
        for name in {name for name, _ in place.files()} - {*names}:
            place.join(name).delete()
    else:
        if len(listed) != 1 or kind == FileType.Directory:
            place.delete()
        if listed:
            Path(ready.path).replace(place.path)
    for path in listed:
        versions.remove(output, path)


def _keep_to(labels: dict[str, str]) -> None:
    """Restricts Ray Data's tasks to nodes with these labels."""
    import ray.data

    ray.data.DataContext.get_current().execution_options.label_selector = labels or None


def _check_output(output: Location) -> None:
    """Checks that the output can be written; ConfigError or StorageError if not."""
    try:
        output.probe()
    except StorageError as e:
        raise type(e)(f"output: {e}") from e
    try:
        output.require_writable()
    except AccessError as e:
        raise ConfigError(f"output: {e}") from e


def _finished(output: Location) -> Manifest | None:
    """Returns the manifest of the dataset at `output` if it is complete, else None."""
    try:
        dataset = manifest.read(output)
    except DataError:
        return None
    sizes = dict(output.files())
    if any(sizes.get(path) != size for path, size in dataset.sizes.items()):
        log.warning("%s: shards are missing or truncated, so heliostat prepares the dataset again", output)
        return None
    return dataset


def _report(
    dataset: Manifest, seconds: float, up_to_date: bool, pruned: versions.Pruned, written_by: dict[str, Any] | None
) -> dict[str, Any]:
    meta = dataset.meta
    if pruned.until is not None:
        until = datetime.fromtimestamp(pruned.until).isoformat(" ", "minutes")
        log.info(("%s: heliostat keeps %s, because runs may read replaced versions. The first `heliostat data prepare` after %s "
            "removes the newest one (keep_days)"), dataset.location, plural(pruned.kept, "replaced version"), until)  # fmt: skip
    return {
        "dataset": str(dataset.location),
        "digest": dataset.digest,
        "kind": dataset.kind,
        "documents": meta.get("documents", dataset.rows),
        "tokens": dataset.tokens,
        "shards": len(dataset.paths),
        "chunks": len(dataset.row_groups),
        "dropped": meta.get("dropped", {}),
        "listed": str(listed) if (listed := dataset.location.join(LISTED)).exists() else None,
        "recorded_every": recording.every_of(dataset),
        "duplicates": meta.get("duplicates", 0),
        "rearranged": meta.get(COUNTS),
        "conversations": meta.get(conversations.FACT),
        "vocab_size": meta.get("vocab_size"),
        "written_by": written_by,
        "hub": meta.get(HUB, {}),
        "stored": meta.get(ERRORS, {}) | ({"features": meta["features"]} if "features" in meta else {}),
        "seconds": round(seconds, 2),
        "up_to_date": up_to_date,
        "versions_kept": pruned.kept,
        "removed": {"files": pruned.files, "bytes": pruned.bytes},
    }
