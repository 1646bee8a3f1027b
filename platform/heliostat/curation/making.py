"""Makes a dataset from an input: reads and curates the input, writes the shards, and records the steps in the manifest.

Each kind of dataset (texts, pairs, images) implements reading and shards in a subclass.

From a sample of the input, `Making` predicts the size and cost of the complete dataset.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np

from heliostat.curation import reasons, recording, segment, tally
from heliostat.curation.engine import RUN_SHARE, Curated, StageEngine, filled, segments, summed
from heliostat.curation.pieces import FilePart
from heliostat.curation.predicting import Prediction, alike_of, fixed_seconds, spread_of
from heliostat.curation.prepare import InputFile
from heliostat.curation.sampled import SampledParts
from heliostat.curation.segment import EXAMPLES, DocumentSource, SpilledRun
from heliostat.curation.stage import Stage
from heliostat.curation.text import sources, tasks, tokens
from heliostat.data import manifest, versions
from heliostat.data.manifest import FILES
from heliostat.data.manifest_table import RowGroups
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.tasks import merging, spill
from heliostat.tasks.flow import LEAST_MEMORY, Flow, Task
from heliostat.tasks.merging import ShardRange, by_parts
from heliostat.tasks.pool import TaskFunction
from heliostat.tasks.work import key

SELECTED = 1024  # temporary files of dropped documents from which a task selects the rows to list
log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass
class WrittenShards:
    """Describes written shards: their rows and metadata for the manifest, their counts for the funnel, and the temporary files
    that record each document's shard."""

    rows: RowGroups
    facts: dict[str, Any]
    shard: dict[str, Any] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)


@dataclass
class Making(ABC):
    """Makes the dataset of one pipeline. A subclass reads and writes one kind of dataset, and its fields are the pipeline's
    keys."""

    kind: ClassVar[str] = "rows"
    meanings: ClassVar[dict[str, str]] = {}
    """Meanings of the reasons for which the reader drops documents: reason -> meaning."""
    recorded: ClassVar[bool] = True
    """Whether a dataset with stages records for each document its shard, or the reason why it was dropped."""
    what_read: ClassVar[bool] = False
    """Whether the dataset's record also has `meanings`."""

    flow: Flow
    source: DocumentSource
    output: Location
    stages: list[Stage]
    memory_limit: int
    sample: SampledParts | None = field(default=None, kw_only=True)
    """The sample of the input to read; None: the whole input."""
    every: int = field(default=1, kw_only=True)
    """The dataset records one document in so many (`recording`). A dry run needs the record of all documents."""
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    """CPU seconds of each stage, including earlier runs of the pipeline. Known after the run."""
    counted: tally.Tally = field(default_factory=dict, init=False)
    """Counts of kept and dropped documents per stage (tally), known after the run."""

    @property
    @abstractmethod
    def identity(self) -> list[object]:
        """Returns everything that the documents of `source` depend on, as JSON values."""

    @property
    def columns(self) -> list[str]:
        """Returns the names of the columns that are recorded for each document."""
        return []

    @property
    def all_stages(self) -> list[Stage]:
        return self.stages

    @property
    def as_read(self) -> list[str] | None:
        """Returns the labels of stages whose drop reasons are reported like the reasons of reading. Returns None for a kind of
        dataset without such stages."""
        return None

    @property
    def can_repeat(self) -> bool:
        """Checks whether two copies of a reading task may run at the same time."""
        return True

    @property
    def explained(self) -> bool:
        """Checks whether the dataset records for each document its shard, or the reason why it was dropped."""
        return self.recorded and (bool(self.stages) or self.sample is not None)

    @abstractmethod
    def pieces(self, inputs: list[InputFile]) -> Iterable[list[FilePart]]:
        """Splits the input into pieces. One task reads each piece, a list of file parts."""

    @abstractmethod
    def write(self, curated: Curated) -> WrittenShards:
        """Writes the shards of the kept documents."""

    def run(self, inputs: list[InputFile]) -> tuple[RowGroups, dict[str, Any]]:
        """Writes everything but the manifest, and returns the manifest's rows and metadata."""
        return self._run(self.curated(inputs))

    def _run(self, curated: Curated) -> tuple[RowGroups, dict[str, Any]]:
        dropped = self._dropped(curated)
        listing = self._listed(curated, dropped)
        written = self.write(curated) if curated.runs else WrittenShards(manifest.SCHEMA.empty_table(), {})
        meta: dict[str, Any] = {"kind": self.kind, "dropped": dropped, "listed": listing() if listing else None}
        meta |= recording.facts(self.every) | written.facts
        if len(written.rows) and self.explained:
            meta |= self._explain(curated, written)
        return written.rows, meta

    def curated(self, inputs: list[InputFile]) -> Curated:
        """Reads the input, and runs the documents through the stages. Returns the kept and the dropped documents."""
        warm = self.sample is not None and self.can_repeat  # a web server gets each request once
        engine = StageEngine(self.flow, self.source, self.identity, self.memory_limit, self.every, self.can_repeat, warm)
        return engine.curate(self.pieces(inputs), self.all_stages, self.explained)

    def _dropped(self, curated: Curated) -> dict[str, int]:
        """Counts the dropped documents by reason, and logs each reason with examples. For a sample, the prediction shows the
        counts instead."""
        prefixes, dropped, examples = tuple(f"{name}: " for name in self.as_read or ()), Counter[str](), dict[str, list[str]]()
        for reason, number in curated.reasons.items():
            plain = next((reason.removeprefix(prefix) for prefix in prefixes if reason.startswith(prefix)), reason)
            dropped[plain] += number
            examples[plain] = heapq.nsmallest(EXAMPLES, [*examples.get(plain, []), *curated.examples[reason]])
        if self.sample is None:
            log_dropped(dropped, examples, self.meanings, self.stages)
        return dict(sorted(dropped.items()))

    def _listed(self, curated: Curated, dropped: dict[str, int]) -> Callable[[], list[str]] | None:
        of_reading = {reason: number for reason, number in dropped.items() if ": " not in reason}
        rows = recording.rows(of_reading, self.every)
        also = {} if self.as_read is None else {"also": self.as_read}
        return listed(self.flow, rows, sorted(curated.left_out), self.output, **also) if rows else None

    def _explain(self, curated: Curated, written: WrittenShards) -> dict[str, Any]:
        """Writes the funnel (counts per stage), and each document's shard or reason for dropping it, to files. Returns the
        manifest's metadata about these files."""
        total = summed(self.flow, sorted(curated.tallies))
        explained = reasons.explained(self.all_stages, total, written.shard)
        for name in (segment.READ, segment.FINISH) if self.what_read else ():
            explained |= {name: explained[name] | {"what": self.meanings}} if name in explained else {}
        funnel = json.dumps({name: json.loads(json.dumps(explained[name], sort_keys=True)) for name in explained}).encode()
        rows = recording.rows({**curated.reasons, "kept": written.shard["documents"]}, self.every)
        ends = sorted([*curated.left_out, *written.ends])
        work = by_parts(self.flow, "ends", reasons.parts(rows), ends, output=self.output.uri, columns=self.columns)
        records = self.flow.all("ends", reasons.write_ends, work, valid=lambda r: self.output.join(r["path"]).exists())
        path = versions.store(self.output, f"{FILES}/funnel-", funnel, ".json")
        self.counted, self.seconds = total, self._seconds(total)
        places = [[r["begin"], r["path"]] for r in records]
        return {"curation": {"funnel": path, "ends": places}, "also": sorted({path, *(p for _, p in places)})}

    def _seconds(self, total: tally.Tally) -> dict[str, float]:
        of_stages = {name: round(total[name]["seconds"], 3) for name in total if name not in (segment.READ, segment.FINISH)}
        first = sum(of_stages.get(tally.label(number, stage), 0.0) for number, stage in segments(self.all_stages)[0])
        reading, shards = self.flow.seconds.get("read", 0.0), self.flow.seconds.get("shards", 0.0)
        return {segment.READ: round(max(0.0, reading - first), 3), **of_stages, "shard": round(shards, 3)}

    def ranges(self, runs: list[SpilledRun], shards: int, bounds: merging.Bounds | None = None) -> list[ShardRange]:
        """Splits the documents' hashes into ranges, one per shard; by default, equal ranges. Returns the ranges with the
        temporary files to read. If a shard would read too little from each of many files, merges files first."""
        of_hashes = bounds or (lambda first, stop: tasks.bounds(first, shards, stop))
        return merging.merged(self.flow, runs, shards, of_hashes, self.memory_limit // RUN_SHARE)

    def shards(self, function: TaskFunction, work: Iterator[Task], cpus: int = 1) -> Iterator[dict[str, Any]]:
        """Writes the shards that don't exist yet. Yields each task's record when the task finishes."""
        present = dict(self.output.files())

        def whole(record: dict[str, Any]) -> bool:
            return all(present.get(shard["path"], 0) == shard["file_bytes"] for shard in record.get("shards", [record]))

        return (record for _, record in self.flow.run("shards", function, work, cpus=cpus, valid=whole))

    def tokenizer_facts(self, definition: str, end_of_document: str, folders: list[Location] | None = None) -> dict[str, Any]:
        """Stores a tokenizer in each of the folders. Returns the tokenizer's part of the manifest."""
        tokenizer = tokens.load(definition)
        (path,) = {versions.store(folder, f"{FILES}/tokenizer-", definition.encode(), ".json")
                   for folder in folders or [self.output]}  # fmt: skip
        return {
            "files": {"tokenizer.json": path},
            "tokenizer": hashlib.sha256(definition.encode()).hexdigest(),
            "vocab_size": tokenizer.get_vocab_size(),
            "end_of_document": tokens.end_id(tokenizer, end_of_document),
        }

    def predicted(self, inputs: list[InputFile]) -> dict[str, Any]:
        """Makes a dataset from the sample, and returns the prediction for the whole input, as JSON values."""
        assert self.sample is not None
        curated = self.curated(inputs)
        rows, meta = self._run(curated)
        if not len(rows):
            raise DataError(
                f"--sample: the sample is empty after all stages (dropped: {meta.get('dropped')}). Pass a larger --sample"
            )
        funnel = json.loads(self.output.join(meta["curation"]["funnel"]).read())
        spread = spread_of(self.flow, curated.runs, self.sample.fraction)
        shares = alike_of(self.flow, self.output, meta["curation"]["ends"], funnel, self.sample)
        fixed = fixed_seconds(self.flow)
        estimate = Prediction(self.sample, self.all_stages, funnel, self.flow, self.counted, spread, fixed, shares,
                              **self.of_prediction)  # fmt: skip
        notes = self.refine(estimate, curated)
        prediction = estimate.report(len(inputs))
        prediction["notes"] += notes
        return prediction

    @property
    def of_prediction(self) -> dict[str, Any]:
        """Returns the fields of the prediction that only this kind of dataset has."""
        return {}

    def refine(self, prediction: Prediction, curated: Curated) -> list[str]:
        """Adds the estimates for this kind of dataset to a prediction. Returns notes on the prediction."""
        return []


def listed(flow: Flow, rows: int, names: list[str], output: Location, **also: object) -> Callable[[], list[str]]:
    """Starts to list the dropped documents (about `rows` documents). Returns a function that writes the list, one file per range
    of hashes, and returns the files' paths."""
    room, several = max(flow.memory, LEAST_MEMORY) // RUN_SHARE, len(names) > SELECTED
    some = filled(names if several else [], lambda name: spill.size_of(name) or 0, room, SELECTED)
    select = (Task(key("select", group, also), {"names": group, **also}) for group in some)
    selected = flow.ahead("select", tasks.select_left_out, select)

    def write() -> list[str]:
        files = [name for record in selected() for name in record["files"]] if several else names
        work = by_parts(flow, "listed", reasons.parts(rows), files, {}, output=output.uri, **also)
        records = flow.all("listed", tasks.list_left_out, work, valid=lambda record: output.join(record["listed"]).exists())
        return [record["listed"] for record in records]

    return write


def spread(items: Sequence[Item]) -> list[Item]:
    """Returns the items in a fixed order in which neighbors are far apart. So the folders of the shards that tasks write at the
    same time have different prefixes, which a store serves in parallel."""
    return [items[place] for place in np.argsort(spill.mixed(np.arange(len(items)))).tolist()]


def log_dropped(dropped: Counter[str], examples: dict[str, list[str]], meanings: dict[str, str], stages: list[Stage]) -> None:
    """Logs the dropped documents by reason, with examples."""
    of_stages = {f"{tally.label(number, stage)}: {reason}": f"{stage.named()}: {what}"
                 for number, stage in enumerate(stages) for reason, what in stage.reasons.items()}  # fmt: skip
    known = meanings | of_stages
    for reason, count in sorted(dropped.items()):
        log.warning("dropped %s: %s, for example %s", f"{count:,}", known.get(reason, reason), sources.examples(examples[reason]))
