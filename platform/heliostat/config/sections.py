"""Defines the sections of the job file except `train`: data, evaluation, checkpoints, workers and their failures, and MLflow."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from heliostat.config.fields import LARGEST, Count, Experiment, Filled, Fraction, Name, NonNegative, Positive, Seed
from heliostat.schema import Float, Strict, Was


class Source(Strict):
    path: str
    """A prepared dataset, or a collection of them: a folder, or `s3://bucket/prefix`."""
    weight: NonNegative = 1.0
    """Its share of the samples, relative to the other sources'."""
    max_epochs: Annotated[Float, Field(gt=0)] | None = None
    """So many passes over it; then it is left out, and the other sources share its weight. Unset: no limit."""


class MixChange(Strict):
    step: Positive
    """The weights hold for all steps after this one."""
    weights: list[NonNegative]
    """One for each source, in the order of `data.sources`."""


class Data(Strict):
    path: Annotated[str | None, Field(exclude=True)] = None
    """The one dataset that is trained on: short for `sources: [{path: ...}]`."""
    sources: Annotated[list[Source], Field(min_length=1), Filled("from `path`")]
    """The datasets that are mixed, each path once."""
    sequence_length: Annotated[int, Field(gt=1)] | None = None
    """Tokens in a sample. Needed where the datasets hold tokens; images have none."""
    seed: Seed = 0
    """Of the order of samples."""
    virtual_ranks: Annotated[Count | None, Was("lanes")] = None
    """Virtual data-parallel ranks, fixed for the run: any number of workers that divides them can continue it. Unset: one for
    each micro-batch of a step (`train.global_batch_size` / `train.micro_batch_size`)."""
    shuffle_window: Annotated[Count | None, Was("window")] = None
    """Samples that are shuffled together, and fetched by one task. Unset: 32 MB of them."""
    mix_schedule: list[MixChange] = []
    """A curriculum: other weights after a step, in ascending order of steps. A source may start with weight 0."""
    on_bad_sample: Literal["replace", "fail"] = "replace"
    """`replace`: a damaged chunk's samples are replaced by others of their window, counted and listed; `fail`: the run stops.
    See docs/data-order.md#bad-data"""
    max_bad_fraction: Fraction = 0.01
    """Replaced samples, as a share of an epoch's (or of all that were trained on, if more), beyond which the run stops."""
    memory_limit: ByteSize = ByteSize(2 << 30)
    """Bytes (`512MiB`) for samples on their way from storage to workers, for each stream: large runs have one on each node."""
    one_source_batches: bool = False
    """A lane's samples of a step all come from one source. Set by itself where a source is a collection of buckets."""
    labels: dict[str, str] = {}
    """Only nodes that carry these Ray labels fetch samples. Empty: any node."""
    document_mask: bool = False
    """Packed documents do not see each other. Refused for models in which they do, see docs/training/document-masks.md"""

    @model_validator(mode="before")
    @classmethod
    def _take_path(cls, value: object) -> object:
        """Replaces `path` by the source that it is short for."""
        if not isinstance(value, dict) or not isinstance(value.get("path"), str):
            return value
        if "sources" in value:
            raise ValueError("path is short for one source, and sources are given, too. Remove one of them")
        return {"sources": [{"path": value["path"]}]} | {key: part for key, part in value.items() if key != "path"}


BENCHMARK = "bench/"  # and a task's name: what its score is called


class Benchmarks(Strict):
    suite: str = Field(min_length=1)
    """A suite's file (docs/benchmark.md), from the workspace on."""
    every: Positive
    """Steps between two checkpoints that are scored: a multiple of `checkpoint.every`. The last is always scored."""
    wait: Annotated[Float, Field(ge=0)] = 3600.0
    """Seconds that the end of the run waits for the last scores."""


class Evaluate(Strict):
    every: Positive
    """Steps between two evaluations. The last step is always evaluated."""
    samples: Count = 256
    """Held-out samples that are scored, at most; where there are fewer, the run says so."""
    fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.01
    """Share of the documents that is held out by the hash of their text, and never trained on. 1, 2 and 5 parts of ten to ten
    thousand are exact, see docs/data-order.md#held-out-documents"""
    benchmarks: Benchmarks | None = None
    """Scores checkpoints on tasks while the run trains. Unset: none. See docs/benchmark.md#while-a-run-trains"""

    def due(self, done: int) -> bool:
        """Tells whether the model is scored after `done` steps."""
        return done % self.every == 0


class Best(Strict):
    metric: str = "loss"
    """A score of the evaluation, as the recipe reports it; or `bench/TASK`, which `heliostat model benchmark --follow` gives
    later."""
    mode: Literal["min", "max"] = "min"
    """Whether a low or a high score is good."""
    keep: Positive = 1
    """So many checkpoints with the best scores stay."""

    @property
    def is_late(self) -> bool:
        """Tells whether the score is a benchmark's, which comes after the save."""
        return self.metric.startswith(BENCHMARK)


class Checkpoint(Strict):
    every: Annotated[Positive, Filled("a tenth of `train.steps`, at most 1,000")]
    """Steps between two checkpoints."""
    keep: Positive = 2
    """So many of the newest stay."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of so many steps stay for ever. Unset: no such rule."""
    best: Best | None = None
    """The best by a score stay, too. Unset: no such rule. See docs/checkpoints.md#what-is-kept"""
    grace: Annotated[Float, Field(gt=0)] = 60.0
    """Seconds for the last checkpoint after SIGTERM, Ctrl-C or a preemption notice."""
    memory_every: Positive | None = None
    """Steps between two copies of the training state in the memory of its node and of another, from which a run continues after
    a failure; it loses at most so many steps. Unset: none, only checkpoints. See docs/reliability/memory-checkpoints.md"""
    memory_limit: ByteSize = ByteSize(8 << 30)
    """Bytes (`8GiB`) of each node's memory for these copies. Where they need more, none are kept, and the run says so."""

    def due(self, done: int) -> bool:
        """Tells whether the state is saved after `done` steps."""
        return done % self.every == 0

    def copy_due(self, done: int) -> bool:
        """Tells whether the state is copied into memory after `done` steps."""
        return self.memory_every is not None and done % self.memory_every == 0


def _count(value: object) -> object:
    """Validates a number of workers, or [least, most]."""
    both = value if isinstance(value, list) else [value, value]
    counts = [n for n in both if isinstance(n, int) and not isinstance(n, bool)]
    if not len(both) == len(counts) == 2 or not 0 < counts[0] <= counts[1] <= LARGEST:
        raise ValueError(f"{value!r} is neither a number of workers nor [least, most], as [1, 4]")
    return value


class Workers(Strict):
    count: Annotated[int | list[int], BeforeValidator(_count)] = 1
    """How many; or `[least, most]` for an elastic run, see docs/reliability/elastic.md"""
    cpus: Annotated[Float, Field(gt=0)] = 1.0
    """Cores of each."""
    gpus: Annotated[Float, Field(ge=0), Filled("`auto`")] = 0.0
    """GPUs of each: 1, or 0 to train on CPUs with gloo. `auto`: 1 if this machine, or the cluster file, has GPUs."""
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    """`pack`: on as few nodes as possible; `spread`: on as many; `strict_spread`: each on a node of its own."""
    labels: dict[str, str] = {}
    """Only nodes that carry these Ray labels hold workers. Empty: any node."""

    @property
    def least(self) -> int:
        return self.count[0] if isinstance(self.count, list) else self.count

    @property
    def most(self) -> int:
        return self.count[1] if isinstance(self.count, list) else self.count


class Limits(Strict):
    hours: Annotated[Float, Field(gt=0)] | None = None
    """Hours of the run, over all its commands; time between two commands doesn't count. At the limit the run stops after a
    checkpoint; `--resume` with a higher limit continues. See docs/reliability/stop.md#limits"""
    cost: Annotated[Float, Field(gt=0)] | None = None
    """The same of money: what the devices that workers hold cost, by the list prices of `heliostat plan`, in its currency."""


class Retries(Strict):
    max: Annotated[int, Field(ge=0)] = 10
    """Failures in a row without a new checkpoint between them. Preemptions do not count. See
    docs/reliability/failures.md"""
    backoff: NonNegative = 1.0
    """Seconds before the second retry in a row; the first comes at once, each further one waits twice as long."""
    backoff_max: NonNegative = 60.0
    """The longest wait, in seconds."""


class Watchdog(Strict):
    stall: Annotated[Float, Field(gt=0)] = 300.0
    """Seconds in which some worker must make progress: a micro-batch, or a batch of an evaluation."""
    start: Annotated[Float, Field(gt=0)] = 1800.0
    """The same before the first step is done."""


class Mlflow(Strict):
    uri: Annotated[str, Filled("MLFLOW_TRACKING_URI, or `sqlite:///.heliostat/mlflow.db`")]
    """The tracking store: `sqlite:///FILE`, or `http://HOST:PORT`. It never holds a password."""
    experiment: Annotated[Experiment, Filled("the job's name")]
    """Of the run: up to 250 characters; no part between slashes is empty, `.` or `..`."""
    register_as: Name | None = Field(default=None, alias="register")
    """Name of the registered model that the run makes a version of. Unset: the model is logged, and not registered."""
    alias: Name | None = None
    """That the new version gets, as `candidate`."""


class Card(Strict):
    """Holds what people must know of the model, its model card, which travels with it."""

    license: Name | None = None
    """SPDX identifier, as `Apache-2.0`. Unset: the parent model's, or `unknown`."""
    summary: str = ""
    """What the model is."""
    intended_use: str = ""
    """What it is for."""
    limitations: str = ""
    """What it is not for, and where it fails."""
