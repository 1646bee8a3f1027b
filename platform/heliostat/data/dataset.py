"""Provides the run's data: the job's prepared datasets, their split and order, and the samples in their shards.

`DataPlan` is a small record that determines every sample of the run. Each checkpoint stores the plan. Fetch tasks receive the
plan, and build a `Dataset` from the plan and the manifests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from heliostat.config.spec import Job
from heliostat.data import manifest
from heliostat.data.chunks import Chunks, Gathered
from heliostat.data.content import Content, join, take
from heliostat.data.manifest import Manifest
from heliostat.data.mixing import LARGEST, Shape, choose_shape
from heliostat.data.order import Order, SamplePlaces
from heliostat.data.split import NEWEST, split
from heliostat.errors import ConfigError, DataError
from heliostat.storage import wire
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Number, Whole, closed
from heliostat.text import printable


@closed
@dataclass(frozen=True)
class DataPlan:
    """Holds everything that determines the global sequence, and the locations of the datasets."""

    uris: tuple[str, ...]
    digests: tuple[str, ...]
    mix: tuple[tuple[Whole, tuple[Number, ...]], ...]  # (step, weights from this step on), ascending
    max_epochs: tuple[Number | None, ...]
    sequence_length: Annotated[int, Field(gt=1, le=LARGEST)] | None
    seed: Whole
    held_fraction: Annotated[float, Field(ge=0, lt=1)]
    shape: Shape
    # (step of the rollback, step, count): from `step` of the run on, the sequence is `count` steps ahead
    skips: tuple[tuple[Whole, Whole, Whole], ...] = ()
    version: int = NEWEST  # of the rules that derive the sequence and the held-out samples from the other fields

    @property
    def begins(self) -> int:
        """Returns the first step for which a run uses this plan."""
        return self.skips[-1][0] if self.skips else self.first_step

    @property
    def first_step(self) -> int:
        """Returns the step at which the sequence starts: 0, or the step at which the run's data changed."""
        return self.mix[0][0]

    @property
    def weights(self) -> tuple[float, ...]:
        """Returns the sources' weights at the start of the sequence."""
        return self.mix[0][1]

    def dump(self) -> dict[str, Any]:
        return json.loads(PLAN.encode(self))

    @staticmethod
    def parse(raw: object, where: object = "the data plan") -> DataPlan:
        """Builds the plan from the output of `dump`. Raises DataError if `raw` isn't a valid plan. The error's text begins with
        `where`."""
        if isinstance(raw, dict):
            raw = {"version": 1, **raw}  # plans of the oldest runs have no version
            version, others = raw["version"], sorted(raw.keys() - {f.name for f in dataclasses.fields(DataPlan)})
            if isinstance(version, int) and version > NEWEST:  # checked before the keys, which may differ in a newer version
                raise DataError(
                    f"{where}: version {version} isn't supported; this heliostat reads 1 to {NEWEST}. Use a newer heliostat"
                )
            if others:
                raise DataError(
                    f"{where}: written by another version of heliostat (unknown key {printable(others[0])[:100]!r}). "
                    "Use that version"
                )
        return PLAN.build(raw, where)

    @staticmethod
    def read(place: Location) -> DataPlan:
        """Reads the plan in a file. Raises FileNotFoundError if the file is missing."""
        return DataPlan.parse(RAW.read(place), place)

    @property
    def digest(self) -> str:
        """Computes the digest of the global sequence: 32 hex digits.

        The digest stays the same if a dataset moves to another place.
        """
        fixed = {k: v for k, v in self.dump().items() if k != "uris"}
        for key, was in (("skips", []), ("version", 1)):  # so that plans that are older than these keys keep their digests
            if fixed[key] == was:
                del fixed[key]
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:32]

    def differences(self, other: DataPlan) -> list[str]:
        """Lists the changes from this plan to `other`, one line each, with the names of the job's keys."""
        names = {"version": "the version of the data plan", "digests": "the datasets' content",
                 "mix": "data.sources weights and data.mix_schedule, as [step, weights]",
                 "max_epochs": "data.sources max_epochs", "sequence_length": "data.sequence_length", "seed": "data.seed",
                 "held_fraction": "evaluate.fraction"}  # fmt: skip
        mine, theirs = self.dump(), other.dump()
        lines = [f"{label}: {mine[key]} -> {theirs[key]}" for key, label in names.items() if mine[key] != theirs[key]]
        shape = {"batch": "train.global_batch_size", "lanes": "data.virtual_ranks", "superstep": "steps per block",
                 "window": "data.shuffle_window", "unit": "data.one_source_batches, in samples"}  # fmt: skip
        return lines + [
            f"{label}: {mine['shape'][key]} -> {theirs['shape'][key]}"
            for key, label in shape.items()
            if mine["shape"][key] != theirs["shape"][key]
        ]


def _fault(plan: DataPlan) -> str | None:
    shape, sources, steps = plan.shape, len(plan.uris), [step for step, _ in plan.mix]
    per_lane, rest = divmod(shape.batch, shape.lanes)
    if plan.version < 1:
        return f"version: {plan.version} isn't supported"
    if not sources or {len(plan.digests), len(plan.max_epochs), *(len(weights) for _, weights in plan.mix)} != {sources}:
        return "uris, digests, max_epochs, and weights don't all have one entry per source"
    if not steps or any(a >= b for a, b in itertools.pairwise(steps)):
        return "mix: the steps aren't in ascending order"
    if any(min(weights) < 0 or not 0 < math.fsum(weights) < 1e18 for _, weights in plan.mix):
        return "mix: weights must not be negative, and at least one must be above 0"
    if any(limit is not None and not 0 < limit < 1e12 for limit in plan.max_epochs):
        return "max_epochs: must be above 0"
    if rest or per_lane % shape.unit or shape.window % (shape.steps_per_block * per_lane):
        return "shape: lanes must divide batch, unit must divide the samples per lane, and a block must divide window"
    return None


RAW, PLAN = Format(dict[str, object], "data plan"), Format(DataPlan, "data plan", check=_fault)


def plan(job: Job, manifests: list[Manifest], recorded: DataPlan | None = None, first_step: int | None = None) -> DataPlan:
    """Makes the data plan of a job.

    For a resumed run, values that the job doesn't set (virtual ranks, window) come from `recorded`.

    `first_step`: step at which the sequence starts; default: the recorded plan's first step, or 0. Weight changes before this
    step have already taken effect.

    Raises ConfigError if the worker count doesn't divide the recorded run's virtual ranks. Also raises ConfigError if all samples
    of a virtual rank in a step must come from one source, and `train.micro_batch_size` doesn't divide the number of these
    samples.
    """
    length = job.data.sequence_length
    lanes = job.virtual_ranks if job.data.virtual_ranks or recorded is None else recorded.shape.lanes
    if (
        recorded is not None
        and lanes == recorded.shape.lanes
        and job.train.global_batch_size == recorded.shape.batch
        and not job.data.shuffle_window
        and job.data.one_source_batches == (recorded.shape.unit > 1)
    ):
        shape = recorded.shape
    else:
        size = sample_bytes(length, manifests)
        shape = choose_shape(job.train.global_batch_size, lanes, size, job.data.shuffle_window, job.data.one_source_batches)
    if job.data.one_source_batches and shape.per_lane % job.train.micro_batch_size:
        raise ConfigError(
            f"train.micro_batch_size: {job.train.micro_batch_size} doesn't divide the {shape.per_lane} samples of a virtual "
            f"rank, which come from one source. Use {shape.per_lane}, or change data.virtual_ranks"
        )
    if recorded is not None and not job.worker_counts(lanes):  # for a new run, the job's own rules say it
        raise ConfigError(
            f"workers.count: {job.workers.count} doesn't divide the run's {lanes} virtual ranks. Use a divisor of this number"
        )
    start = first_step if first_step is not None else recorded.first_step if recorded else 0
    changes = [(0, [s.weight for s in job.data.sources]), *((c.step, c.weights) for c in job.data.mix_schedule)]
    now = [weights for step, weights in changes if step <= start][-1]
    return DataPlan(
        uris=tuple(s.path for s in job.data.sources),
        digests=tuple(m.digest for m in manifests),
        mix=((start, tuple(now)), *((step, tuple(weights)) for step, weights in changes if step > start)),
        max_epochs=tuple(s.max_epochs for s in job.data.sources),
        sequence_length=length,
        seed=job.data.seed,
        held_fraction=job.evaluate.fraction if job.evaluate else 0.0,
        shape=shape,
        skips=recorded.skips if recorded and first_step is None else (),
        version=recorded.version if recorded else NEWEST,  # a run keeps its held-out samples
    )


def sample_bytes(sequence_length: int | None, manifests: list[Manifest]) -> int:
    """Computes the mean number of bytes of a sample.

    For row datasets, counts the stored bytes. For token datasets, counts 4 bytes per token.
    """
    stored = sum(int(m.chunks["bytes"].to_numpy().sum()) for m in manifests)
    return 4 * sequence_length if sequence_length else max(1, stored // max(1, sum(m.rows for m in manifests)))


def make_order(plan: DataPlan, sources: list[Manifest]) -> Order:
    splits = [split(s, plan.sequence_length, plan.held_fraction, plan.version) for s in sources]
    mix = [(step, list(weights)) for step, weights in plan.mix]
    return Order(splits, mix, plan.seed, plan.shape, list(plan.max_epochs), [skip[1:] for skip in plan.skips],
                 plan.version)  # fmt: skip


@wire.travels
@dataclass(frozen=True)
class Bad:
    """Describes a sample that can't be used. `by`: the sample of the same window that replaced it."""

    position: int
    source: int
    chunk: int
    row: int
    reason: str
    by: tuple[int, int, int]  # source, chunk, row


@dataclass(frozen=True)
class Loaded:
    samples: SamplePlaces  # as trained on: a replaced sample has its replacement's place
    content: Content
    bad: list[Bad]


class Dataset:
    """Provides the order of a data plan's samples, and their contents; reads the plan's manifests."""

    def __init__(self, plan: DataPlan) -> None:
        self.plan = plan
        self.sources = [manifest.read_shared(Location(uri), d) for uri, d in zip(plan.uris, plan.digests, strict=True)]
        self.order = make_order(plan, self.sources)
        self._chunks = Chunks(self.sources, plan.sequence_length)

    def gather(self, samples: SamplePlaces) -> Gathered:
        """Reads the contents of samples, and reports which samples are bad."""
        return self._chunks.gather(samples)

    def read(self, samples: SamplePlaces) -> Content:
        """Reads the contents of samples in order. Raises DataError if a sample is bad."""
        gathered = self.gather(samples)
        if gathered.faults:
            raise DataError(next(iter(gathered.faults.values())))
        return gathered.content

    def load(self, positions: np.ndarray, replace: bool = True) -> Loaded:
        """Loads the samples at positions of the global sequence, and replaces bad ones.

        The replacement is the next good sample of the same source in the window; after the window's last sample, the search
        continues with the first one. If the source has no good sample in the window, the next good sample of any source is
        used. So the choice depends only on the window's content. It doesn't depend on the process that reads, or on the step at
        which a run resumes. Raises DataError for a bad sample if `replace` is false, or if its window has no good sample.
        """
        samples = self.order.locate(positions)
        gathered = self.gather(samples)
        if gathered.faults and not replace:
            raise DataError(
                f"{next(iter(gathered.faults.values()))}. To train on another sample instead, set data.on_bad_sample to 'replace'"
            )
        bad: list[Bad] = []
        parts = [gathered.content] if len(gathered.content) else []  # the replacements follow, one by one
        index, first = np.arange(len(samples)), len(gathered.content)
        windows: dict[int, tuple[SamplePlaces, Gathered]] = {}
        for i, reason in sorted(gathered.faults.items()):
            window, begin, end = self.order.window_at(int(positions[i]))
            if window not in windows:
                whole = self.order.locate(np.arange(begin, end))
                windows[window] = whole, self.gather(whole)
            whole, read = windows[window]
            j = _replacement(int(positions[i]) - begin, whole, read, reason)
            index[i] = first + len(bad)
            parts.append(take(read.content, np.array([j])))
            bad.append(Bad(int(positions[i]), int(samples.source[i]), int(samples.chunk[i]), int(samples.row[i]), reason,
                           (int(whole.source[j]), int(whole.chunk[j]), int(whole.row[j]))))  # fmt: skip
            for field in ("source", "epoch", "chunk", "row"):
                getattr(samples, field)[i] = getattr(whole, field)[j]
        return Loaded(samples, take(join(parts), index) if bad else gathered.content, bad)


def _replacement(at: int, window: SamplePlaces, read: Gathered, reason: str) -> int:
    """Finds the replacement of the sample at index `at` of a window. Returns the replacement's index in the window.

    Raises DataError if the window has no good sample.
    """
    turn = np.roll(np.arange(len(window)), -at)
    same = turn[window.source[turn] == window.source[at]]
    for j in (*same, *turn):
        if int(j) not in read.faults:
            return int(j)
    raise DataError(f"{reason}; all samples of the shuffle window are bad. Restore the shards, or prepare the dataset again")


@lru_cache(maxsize=2)
def open_dataset(plan: DataPlan) -> Dataset:
    """Opens the dataset of a plan. The process caches the dataset, because it runs many fetch tasks."""
    return Dataset(plan)
