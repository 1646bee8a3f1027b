"""Defines the keys of pipelines that run as recorded tasks, with stages between reading and shards."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ByteSize, Field, PrivateAttr, SerializeAsAny, model_validator

from heliostat.curation import reasons, recording, registry
from heliostat.curation.making import Making
from heliostat.curation.prepare import InputFile, Pipeline, place
from heliostat.curation.sampled import SampledParts
from heliostat.curation.stage import Stage
from heliostat.curation.text import ahead
from heliostat.curation.watching import PipelineWatch
from heliostat.data.manifest import Manifest, kept_path
from heliostat.data.manifest_table import RowGroups
from heliostat.errors import ConfigError, MissingExtraError
from heliostat.schema import nearest
from heliostat.storage.locations import Location
from heliostat.tasks import shipping
from heliostat.tasks.clusters import Cluster
from heliostat.tasks.flow import LEAST_MEMORY, Flow
from heliostat.tasks.progress import Progress
from heliostat.tasks.work import Work


class StagedPipeline(Pipeline):
    """Defines a pipeline that records each finished task, so that an interrupted run can resume."""

    _seconds: dict[str, float] = PrivateAttr(default_factory=dict)
    _watch: PipelineWatch | None = PrivateAttr(default=None)

    beside = frozenset({"work", "keep_work", "memory_limit"})
    ray_data = False
    moved: ClassVar[dict[str, str]] = {}
    """Keys that have moved into `columns` since earlier versions: old name -> new name."""

    stages: Annotated[
        list[Annotated[SerializeAsAny[Stage], BeforeValidator(registry.parse)]], BeforeValidator(registry.require_list)
    ] = []
    """Stages for documents, or for images with captions, between reading and shards, in this order: `{stage: NAME, KEY: VALUE}`.
    See docs/data/stages.md"""
    memory_limit: ByteSize = Field(ByteSize(2 << 30), ge=LEAST_MEMORY)
    """Bytes of memory that a task may use, in addition to the memory of its process at the start. Ray reserves this memory, so a
    node runs only as many tasks as fit. For reads in advance from an object store, Ray reserves more: 48 MiB if the work is in a
    store, and 64 MiB for a task that reads its input from a store. If a node has memory for fewer tasks than CPUs, heliostat logs
    this. Set more memory for a Parquet file with large row groups (docs/benchmarks/curation.md), or for documents above a
    fortieth of this value."""
    work: str | None = None
    """Folder or `s3://` prefix for unfinished work, from which an interrupted run resumes. Unset: next to the output, with
    `.work` after its name. See docs/data/work.md"""
    keep_work: bool = False
    """Keeps the work after publishing, so that the next run only processes new input."""

    record_documents: recording.RecordDocuments = "all"
    """Documents for which the dataset records their shard, or the reason why they were dropped. `all`: every document. `sample`:
    one document in 1,000, chosen by the hash of its id. `none`: no document. The counts of reasons are exact in each case, and
    crashed and unread documents are always recorded. See docs/curation.md#record-fewer-documents"""

    @model_validator(mode="before")
    @classmethod
    def _take_old_columns(cls, value: object) -> object:
        """Converts old keys: a list in `columns` becomes `columns.others`, and keys in `moved` become keys of `columns`."""
        columns = value.get("columns") if isinstance(value, dict) else None
        old = cls.moved.keys() & value.keys() if isinstance(value, dict) else ()
        if not isinstance(value, dict) or not (old or isinstance(columns, list)) or "columns" not in cls.model_fields:
            return value
        if columns is not None and not isinstance(columns, list | dict):
            return value  # the schema reports the error
        now = {"others": columns} if isinstance(columns, list) else dict(columns or {})
        for key in sorted(old):
            if cls.moved[key] in now:
                raise ValueError(f"{key} is the old name of columns.{cls.moved[key]}, and both are given. Remove {key}")
            now[cls.moved[key]] = value[key]
        return {key: part for key, part in value.items() if key not in old} | {"columns": now}

    @property
    def worked(self) -> Work:
        """Returns the folder of the pipeline's unfinished work."""
        return Work(place(self.work, "work") if self.work else place(self.output, "output").ending(".work"))

    def flow(self, work: Work | None = None, cluster: Cluster | None = None) -> Flow:
        """Makes the flow that runs the tasks and shows their progress. `work`: a work folder to use instead of the pipeline's
        work folder. `cluster`: the cluster that runs the tasks, by default Ray's."""
        flow = Flow(work or self.worked, self.labels, memory=self.memory_limit, progress=self.progress())
        flow.cluster = cluster or flow.cluster
        flow.input_memory = ahead.MEMORY if str(getattr(self, "input", "")).startswith("s3://") else 0
        return flow

    def progress(self) -> Progress:
        return Progress(self._watch.show) if self._watch else Progress()

    def check_places(self, input: str, here: str | None) -> None:
        """Raises ConfigError if the folders of input, output, and work overlap. `here`: the input's path."""
        output_path = place(self.output, "output").path
        if self.work and _overlap(self.worked.location.path, output_path):
            raise ConfigError(f"work: {self.work!r} and the output {self.output!r} overlap. Set work to another folder")
        if here is None:
            return
        if _overlap(here, output_path):
            raise ConfigError(f"output: {self.output!r} and the input {input!r} overlap. Set output to another folder")
        if _overlap(here, self.worked.location.path):
            raise ConfigError(f"work: {self.worked.location} and the input {input!r} overlap. Set work to another folder")

    def check_stages(self) -> None:
        """Checks each stage. An error about the keys of a stage begins with the stage's number and name."""
        for number, stage in enumerate(self.stages):
            try:
                stage.check()
            except MissingExtraError:
                raise
            except ConfigError as e:
                raise ConfigError(f"stages.{number}: {stage.named()}: {e}") from e

    def check_columns(self, known: Iterable[str], key: str) -> None:
        """Raises ConfigError if documents can't have the columns that stages compare. Without the column, all documents would be
        equal. `known`: columns from reading. `key`: the pipeline key that lists additional columns, "" if there is none."""
        available = set(known)
        for number, stage in enumerate(self.stages):
            if not type(stage).__module__.startswith("heliostat."):
                return  # a user's own stage may make any column
            for field in stage.compares:
                if (name := getattr(stage, field)) and name not in available:
                    hint, also = nearest(name, sorted(available)), f", or add the column to `{key}`" if key else ""
                    fix = f"{hint}{'' if hint.endswith('?') else '.'} Correct the name{also}"
                    problem = f"{name!r} isn't a column of the documents"
                    raise ConfigError(f"stages.{number}: {stage.named()}: {field}: {problem}{fix}")
            available |= stage.made()

    def watched(self, watch: PipelineWatch) -> None:
        self._watch = watch

    def begin_anew(self) -> None:
        self.worked.clear()

    def every(self, sample: SampledParts | None) -> int:
        """Returns the `every` of `recording`. A dry run records all documents, because it compares the duplicates."""
        return 1 if sample is not None else recording.EVERY[self.record_documents]

    @abstractmethod
    def making(self, flow: Flow, output: Location, sample: SampledParts | None = None) -> Making:
        """Returns the object that makes the dataset, from the whole input or from a sample."""

    def sampled(self, inputs: list[InputFile], fraction: float) -> SampledParts:
        """Chooses a sample for a dry run."""
        raise ConfigError(
            f"--sample: {type(self).__name__} doesn't support dry runs. Remove --sample, or set input to some of the files"
        )

    def write(self, output: Location, inputs: list[InputFile]) -> tuple[RowGroups, dict[str, Any]]:
        with self.flow() as flow:
            making = self.making(flow, output)
            rows, meta = making.run(inputs)
        self._seconds = making.seconds
        return rows, meta

    def predict(
        self, folder: Location, inputs: list[InputFile], fraction: float, cluster: Cluster | None = None
    ) -> dict[str, Any]:
        start, sample = time.monotonic(), self.sampled(inputs, fraction)
        with self.flow(Work(folder.join("work")), cluster) as flow:
            predicted = self.making(flow, folder.join("out"), sample).predicted(inputs)
        return predicted | {"name": self.name, "seconds": round(time.monotonic() - start, 2)}

    def uncovered(self) -> dict[str, dict[str, Any]]:
        """Returns the files that the dataset's digest doesn't cover: name -> content. Returns an empty mapping if the dataset has
        no stages."""
        return {reasons.SECONDS: self._seconds} if self._seconds else {}

    def finish(self, dataset: Manifest) -> None:
        """Writes the files that the dataset's digest doesn't cover. Removes the unfinished work, unless `keep_work` is set."""
        for name, facts in self.uncovered().items() if "curation" in dataset.meta else ():
            dataset.location.join(kept_path(dataset.digest, name)).write(json.dumps(facts).encode())
        if self.keep_work:
            shipping.withdraw(self.worked.spill)
        else:
            self.worked.clear()


def _overlap(a: str, b: str) -> bool:
    """Checks whether one of two folders contains the other."""
    return f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/")
