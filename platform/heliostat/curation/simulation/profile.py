"""Measures the tasks of a real run, and derives the time and the record of larger tasks from them.

A task of the simulation takes a measured task of its kind, and scales this task's numbers by the ratio of the bytes that both
read. Spilled files get new names with the scaled size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import xxhash

from heliostat.curation.images.sampling import SampledImages
from heliostat.curation.minhash import exact, keep
from heliostat.curation.readers.survey import Mark, Survey
from heliostat.curation.simulation import images
from heliostat.curation.simulation.hosts import WebModel
from heliostat.curation.simulation.requests import files_in, input_parts, named
from heliostat.curation.text import token_counts
from heliostat.curation.text.sampling import SampledTexts
from heliostat.curation.text.tasks import TextSharding
from heliostat.curation.web.lists import NAMES
from heliostat.errors import ConfigError
from heliostat.tasks import merging, spill
from heliostat.tasks.clusters import Task, TaskKind
from heliostat.tasks.spill import SpilledRun

MERGE_BYTES_PER_S = 60e6
"""Bytes of sorted temporary files that a CPU merges per second: an assumption, used if the sample needed no merge."""
LINES_BYTES_PER_S = 500e6
"""Bytes of which a CPU counts the lines per second: an assumption."""
LISTED_BYTES = 100
"""Bytes of a dropped document's row in a temporary file: an assumption."""
SURVEY_BYTES_PER_S = 100e6
"""Compressed bytes that a CPU surveys per second: an assumption."""

STAR_ROUNDS = 5
"""Rounds after which a simulated search for clusters ends. Two inputs of 7,500 and 9,923 documents needed four and five."""

SUMS = {"tally": "tally", token_counts.KIND: "counts"}
"""Kinds of tasks that sum files, and the names of their results in the records. A simulated sum is the first of its files."""

SAME_SIZE = frozenset({"tokenizer", *SUMS, "rates", "largest"})
"""Kinds of tasks whose files the driver reads, or whose results don't grow with the input. Their records stay as measured."""


@dataclass(frozen=True)
class MeasuredTask:
    """Holds the bytes that a task read, and its record."""

    bytes: int
    record: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Returns the task's CPU seconds without the time in which its process opened stages."""
        return max(0.0, self.record["seconds"] - self.record.get("opening", 0.0))


@dataclass
class Profile:
    """Holds the measured tasks of each kind. A run may start tasks of one kind several times, for example in each round of a
    search for clusters. So the key is (kind, number of the call)."""

    tasks: dict[tuple[str, int], list[MeasuredTask]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    web: WebModel | None = None
    """Limits of tasks that fetch URLs, if the pipeline has such tasks."""
    _chosen: dict[tuple[str, int], tuple[list[MeasuredTask], float]] = field(default_factory=dict)

    def begin(self, kind: str) -> int:
        """Counts a call for tasks of a kind; returns the call's number."""
        call = self.calls.get(kind, 0)
        self.calls[kind] = call + 1
        return call

    def add(self, kind: str, call: int, bytes: int, record: dict[str, Any]) -> None:
        self.tasks.setdefault((kind, call), []).append(MeasuredTask(bytes, record))
        self._chosen.clear()

    def like(self, kind: str, call: int, key: str) -> MeasuredTask | None:
        """Chooses a measured task by the hash of a task's key. Returns None if no task of the kind was measured."""
        usual = self._usual(kind, call)[0]
        return usual[xxhash.xxh64_intdigest(key.encode()) % len(usual)] if usual else None

    def seconds(self, kind: str, call: int, like: MeasuredTask, growth: float) -> float:
        """Returns the CPU seconds of a task that reads `growth` times the bytes of a measured task.

        Measured tasks have different rates, because their documents differ. With `growth` times the documents, the difference
        from the mean rate is smaller by the square root of `growth`, as for independent documents.
        """
        mean = self._usual(kind, call)[1] * like.bytes
        return growth * (mean + (like.seconds - mean) / math.sqrt(max(1.0, growth)))

    def _usual(self, kind: str, call: int) -> tuple[list[MeasuredTask], float]:
        """Returns the measured tasks that represent a kind, and their mean CPU seconds per byte. Tasks that read less than half
        the mean don't represent it, because their fixed costs would be scaled too."""
        place = kind, min(call, self.calls.get(kind, 0) - 1)
        if place not in self._chosen:
            measured = self.tasks.get(place, [])
            mean = sum(task.bytes for task in measured) / max(1, len(measured))
            usual = [task for task in measured if 2 * task.bytes >= mean]
            seconds, bytes = sum(task.seconds for task in usual), sum(task.bytes for task in usual)
            self._chosen[place] = usual, seconds / max(1, bytes)
        return self._chosen[place]


class Sizes:
    """Computes the bytes that a task reads. Remembers the sizes of shared lists, which many tasks read."""

    def __init__(self) -> None:
        self.lists: dict[int, int] = {}
        """Bytes of shared lists of temporary files."""
        self.stored_lists: dict[int, int] = {}  # bytes that the same lists have in the store, where documents are compressed
        self.rows: dict[int, int] = {}
        """Rows of shared lists of documents."""
        self.values: dict[Any, object] = {}
        """Shared values by their references."""

    def share(self, reference: Any, value: object) -> object:
        self.values[id(reference)] = value
        self.lists[id(value)], self.rows[id(value)] = spilled_bytes(value), rows_in(value) if isinstance(value, list) else 0
        self.stored_lists[id(value)] = spilled_bytes(value, stored=True)
        return reference

    def read(self, task: Task) -> int:
        """Returns the bytes that a task reads: its share of all spilled files in its arguments, or its parts of the input. For a
        sample, only the share of the records that the task takes. For a tokenizer, the bytes of its training text."""
        if "samples" in task.arguments:
            return min(task.arguments["bytes"], task.arguments["config"]["train_bytes"])
        if description := images.fetched(task):
            return images.list_bytes(description)
        if parts := input_parts(task):
            source = task.arguments.get("source")
            rate = source.rate if isinstance(source, SampledTexts | SampledImages) else None
            return int(sum(part.length * (rate(part) if rate else 1.0) for part in parts))
        planned = task.arguments.keys() & {"run_bytes", "chunk_images"} or "names" in task.shared or self.plan(task)
        if task.bytes and planned:  # merges, parts of merged files, and shards
            return task.bytes
        shared = [self.values.get(id(value), value) for value in task.shared.values()]
        share = _share_of_keys(task.arguments)
        spilled = sum(self.lists[id(value)] if id(value) in self.lists else spilled_bytes(value) for value in shared)
        own = spilled_bytes(list(task.arguments.values()))
        return int((spilled + own) * share) or task.bytes

    def loads(self, kind: TaskKind, task: Task, read: int) -> tuple[int, int]:
        """Returns the number of temporary files, and the bytes, that a task reads from the store. `read`: the bytes of its
        arguments (`read`). The search for copies reads no documents, although the list of its runs is an argument. The tasks
        that choose near duplicates read files about the documents, and the documents only without these files."""
        if kind.function not in (exact.copies, keep.candidates, keep.decide) or None in task.arguments.get("about", ()):
            return self.files(task), read
        own = {name: value for name, value in task.arguments.items() if name != "runs"}
        bytes = task.bytes - spilled_bytes(task.arguments["runs"]) + spilled_bytes(list(own.values()))
        loaded = replace(task, arguments=own, bytes=bytes)
        return self.files(loaded), self.read(loaded)

    def stored(self, task: Task, read: int) -> int:
        """Returns the bytes that the store sends for `read` bytes of a task's temporary files, by the mean of these files."""
        shared, own = [self.values.get(id(value), value) for value in task.shared.values()], list(task.arguments.values())
        bytes = sum(self.lists[id(value)] if id(value) in self.lists else spilled_bytes(value) for value in shared)
        stored = sum(self.stored_lists[id(value)] if id(value) in self.lists else spilled_bytes(value, True) for value in shared)
        return read * (stored + spilled_bytes(own, True)) // all_bytes if (all_bytes := bytes + spilled_bytes(own)) else read

    def of_runs(self, task: Task) -> tuple[int, int]:
        """Returns the rows and bytes of all temporary files of documents from which a task reads its share."""
        runs = task.arguments.get("runs") or task.shared["runs"]
        shared: Any = self.values.get(id(runs), runs)
        if id(shared) in self.lists:
            return self.rows[id(shared)], self.lists[id(shared)]
        return rows_in(shared), spilled_bytes(shared)

    def plan(self, task: Task) -> TextSharding | None:
        """Returns the shared configuration of a task that writes shards; None for other tasks."""
        shared = (self.values.get(id(value), value) for value in task.shared.values())
        return next((one for one in shared if isinstance(one, TextSharding)), None)

    def files(self, task: Task) -> int:
        """Returns the number of spilled files from which a task reads."""
        if description := images.fetched(task):
            return len(description["names"]) if isinstance(description["names"], list) else NAMES
        return self.shared_files(task) + sum(map(files_in, task.arguments.values()))

    def shared_files(self, task: Task) -> int:
        """Returns the number of spilled files from which all tasks of a call read."""
        return sum(files_in(self.values.get(id(value), value)) for value in task.shared.values())


def spilled_bytes(value: object, stored: bool = False) -> int:
    """Sums the sizes of the spilled files and runs in a value. `stored`: counts the bytes of the runs' files in the store."""
    if isinstance(value, SpilledRun):
        return spill.size_of(value.name) or 0 if stored else value.bytes
    if isinstance(value, str):
        return spill.size_of(value) or 0
    return sum(spilled_bytes(part, stored) for part in value) if isinstance(value, list | tuple) else 0


def _share_of_keys(arguments: Mapping[str, Any]) -> float:
    if "parts" in arguments:
        return 1 / arguments["parts"]
    if "high" in arguments:
        return (arguments["high"] - arguments.get("low", 0)) / spill.ALL
    return 1.0


def synthesized(kind: TaskKind, call: int, task: Task, read: int, profile: Profile, sizes: Sizes) -> dict[str, Any]:
    """Returns the record that a task would have that reads `read` bytes, with its CPU seconds in `seconds`."""
    like = profile.like(kind.name, call, task.key)
    if kind.name == "metadata":
        listed: Any = sizes.values[id(task.shared["listed"])]
        return images.metadata_record(task, listed) | {"seconds": read / LINES_BYTES_PER_S}
    if like is None:
        return _merged(kind, task, read, profile, sizes)
    growth = read / like.bytes if read and like.bytes else 1.0
    seconds = profile.seconds(kind.name, call, like, growth)
    if kind.name in SAME_SIZE:
        return like.record | {"seconds": seconds}
    if kind.name == "lists":
        return images.lists_record(like.record, task.key, growth) | {"seconds": seconds}
    if "chunk_images" in task.arguments:
        return images.shard_record(like.record, task, growth) | {"seconds": seconds}
    record = Scaling(task.key, growth).of({k: v for k, v in like.record.items() if k not in ("run", "wall")})
    record["seconds"] = seconds
    record |= _recorded(record, task, sizes.plan(task))
    if "runs" in record and "run_bytes" in task.arguments:
        record["runs"] = _cut(record["runs"], task.arguments["run_bytes"], task.key)
    if "decided" in record:
        record["decided"] = _decided(like.record, task.arguments["runs"], task.key)
    if kind.function is exact.copies:
        record |= _copied(like.record, task, growth)
    if "shards" in record:
        plan = sizes.plan(task)
        record["shards"] = _shards(like.record["shards"], task, read, plan.chunk_tokens if plan else 1)
    if "unsettled" in record:  # a small sample needs few rounds; only the records of its last round list the clusters' members
        record |= {"unsettled": int(call + 1 < max(STAR_ROUNDS, profile.calls[kind.name]))}
    if "part" in task.arguments and "begin" in record:
        record["begin"] = f"{spill.share(task.arguments['part'], task.arguments['parts'])[0]:x}"
    return record


def _recorded(record: dict[str, Any], task: Task, plan: TextSharding | None) -> dict[str, Any]:
    """Returns the names of the files with the record of documents. The measured tasks recorded all documents, and the simulated
    tasks may record a sample (`recording`)."""
    every = plan.recorded if plan else task.arguments.get("every", 1)
    scaled = Scaling(task.key, 1 / every if every else 0.0)
    return {name: scaled.of(record[name]) if every else [] for name in ("left_out", "ends") if name in record}


@dataclass(frozen=True)
class Scaling:
    """Scales the numbers in a record, and gives spilled files new names."""

    key: str
    growth: float

    def of(self, value: Any) -> Any:
        if isinstance(value, str):
            size = _growing(value)
            return value if size is None else named(f"{self.key} {value}", round(size * self.growth))
        if isinstance(value, dict):
            return {name: self.of(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(part) for part in value]
        if isinstance(value, bool) or value is None:
            return value
        return round(value * self.growth) if isinstance(value, int) else value * self.growth


@lru_cache(maxsize=1 << 16)
def _growing(value: str) -> int | None:
    """Returns the bytes in the name of a temporary file that grows with the input; None for other strings. Remembers the results,
    because many records are made from a few measured ones."""
    return None if value.endswith(".json") else spill.size_of(value)


def _merged(kind: TaskKind, task: Task, read: int, profile: Profile, sizes: Sizes) -> dict[str, Any]:
    """Returns the record of a task of a kind that a small sample doesn't need: merging, summing counts, counting lines,
    surveying compressed files, or listing dropped documents. Raises ConfigError for other kinds."""
    seconds, name = read / MERGE_BYTES_PER_S, named(task.key, sizes.stored(task, read))
    if kind.function in (merging.merge, merging.merge_spills):
        all_rows, all_bytes = sizes.of_runs(task)
        rows = all_rows * read // max(1, all_bytes)
        return {"runs": _cut([[name, rows, read]], task.arguments["run_bytes"], task.key), "files": [name], "seconds": seconds}
    if kind.name in SUMS:
        return {SUMS[kind.name]: task.arguments["names"][0], "files": [], "seconds": seconds}
    if kind.name == "select":
        selected = int(read * _listed_share(profile))
        return {"files": [named(task.key, selected)] if selected else [], "seconds": seconds}
    if kind.name == "listed":
        return {"listed": name, "rows": 0, "files": [], "seconds": seconds}
    if kind.name == "lines":
        return {"lines": 1 + read // 1000, "files": [], "seconds": read / LINES_BYTES_PER_S}
    if kind.name == "survey":
        part = task.arguments["part"]
        survey = Survey(part.start, part.stop, read, 1 + read // 1000, 0, [Mark(part.start, part.start)])
        return {"survey": asdict(survey), "files": [], "seconds": read / SURVEY_BYTES_PER_S}
    raise ConfigError(f"--simulate: {kind.name}: the sample ran no such task. Pass a larger --sample")


def _listed_share(profile: Profile) -> float:
    """Returns the share of the bytes about dropped documents that the list of dropped documents needs, by the sample."""
    listed = profile.tasks.get(("listed", 0), [])
    return min(1.0, LISTED_BYTES * sum(task.record["rows"] for task in listed) / max(1, sum(task.bytes for task in listed)))


def _cut(runs: list[list[Any]], run_bytes: int, key: str) -> list[list[Any]]:
    """Cuts runs into runs of at most `run_bytes` bytes."""
    rows, bytes = sum(run[1] for run in runs), sum(run[2] for run in runs)
    count = -(-bytes // run_bytes)
    stored = sum(spill.size_of(run[0]) or 0 for run in runs)
    return [[named(f"{key} run {i}", stored // count), rows // count, bytes // count] for i in range(count)]


def _decided(measured: Mapping[str, Any], runs: list[SpilledRun], key: str) -> list[list[Any]]:
    """Returns what a task decided about each of its runs: the mean shares of the measured runs."""
    rows, bytes = (sum(one[i] for one in measured["decided"]) / max(1, measured.get("of_rows", 0)) for i in (1, 2))
    return [[named(f"{key} {i}", 600 + int(4 * rows * run.rows)), int(rows * run.rows),
             min(run.bytes, int(bytes * run.rows))] for i, run in enumerate(runs)]  # fmt: skip


def _copied(measured: Mapping[str, Any], task: Task, growth: float) -> dict[str, Any]:
    """Returns the files that list the repeated texts of each of a task's runs: equal parts of the measured files."""
    count, measured_bytes = len(task.arguments["runs"]), sum(spill.size_of(name) or 0 for name in measured["files"])
    names = [named(f"{task.key} {i}", round(measured_bytes * growth / count)) for i in range(count if measured_bytes else 0)]
    return {"copies": names or [None] * count, "files": names}


def _shards(measured: list[dict[str, Any]], task: Task, read: int, chunk_tokens: int) -> list[dict[str, Any]]:
    """Returns the shards that a task writes, each with an equal part of the bytes that it reads."""
    first, stop = task.arguments["first"], task.arguments["stop"]
    if not measured:
        return []
    one = max(measured, key=lambda shard: shard["bytes"])
    growth = read / (stop - first) / max(1, one["bytes"])
    same = {name: value for name, value in one.items() if isinstance(value, str)}
    scaled = Scaling(task.key, growth).of({k: v for k, v in one.items() if k not in same and k not in ("ends", "row_groups")})
    expected = growth * sum(one["row_groups"]["tokens"])
    count = max(1, round(expected / chunk_tokens))
    groups = images.like_first(one["row_groups"], count) | {"tokens": [round(expected / count)] * count}
    paths = [f"shards/{shard:05d}/{task.key[:16]}.parquet" for shard in range(first, stop)]
    return [scaled | same | {"path": path, "row_groups": groups} for path in paths]


def rows_in(runs: Iterable[object]) -> int:
    """Returns the number of documents in temporary files of documents; 0 for other values."""
    return sum(run.rows for run in runs if isinstance(run, SpilledRun))
