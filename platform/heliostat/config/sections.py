"""Defines the sections of the job file except `train`: data, evaluation, checkpoints, workers and their failures, and MLflow."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from heliostat.config.fields import LARGEST, Count, Experiment, Filled, Fraction, Name, NonNegative, Positive, Seed
from heliostat.schema import Float, Strict, Was


class Source(Strict):
    path: str
    """Folder or `s3://bucket/prefix` of a prepared dataset, or of a collection of datasets."""
    weight: NonNegative = 1.0
    """Weight of the source's samples, relative to the other sources."""
    max_epochs: Annotated[Float, Field(gt=0)] | None = None
    """Maximum passes over the source. After that, the other sources share the weight of this source. Unset: no limit."""


class MixChange(Strict):
    step: Positive
    """Step after which the weights apply."""
    weights: list[NonNegative]
    """Weights, one for each source, in the order of `data.sources`."""


class Data(Strict):
    path: Annotated[str | None, Field(exclude=True)] = None
    """Dataset to train on. Short for `sources: [{path: ...}]`."""
    sources: Annotated[list[Source], Field(min_length=1), Filled("from `path`")]
    """Datasets to mix. Each path may be listed only once."""
    sequence_length: Annotated[int, Field(gt=1)] | None = None
    """Tokens per sample. Required for token datasets. Image datasets don't use this key."""
    seed: Seed = 0
    """Random seed for sample order."""
    virtual_ranks: Annotated[Count | None, Was("lanes")] = None
    """Number of virtual data-parallel ranks, fixed for the run. The run can continue on any number of workers that divides this
    number. Unset: one virtual rank per micro-batch of a step (`train.global_batch_size` / `train.micro_batch_size`)."""
    shuffle_window: Annotated[Count | None, Was("window")] = None
    """Size of the shuffle window in samples. A single task fetches a window. Unset: 32 MB of samples."""
    mix_schedule: list[MixChange] = []
    """Curriculum: new weights of the sources after a step, in ascending order of steps. A source may start with weight 0."""
    on_bad_sample: Literal["replace", "fail"] = "replace"
    """`replace`: replaces the samples of a damaged row group with other samples from their shuffle window, and counts and lists
    the replaced samples. `fail`: stops the run. See docs/data-order.md#bad-data"""
    max_bad_fraction: Fraction = 0.01
    """Maximum share of replaced samples, relative to the samples of an epoch (or to all trained samples, if these are more). If
    the share is higher, the run stops."""
    memory_limit: ByteSize = ByteSize(2 << 30)
    """Maximum bytes (`512MiB`) of samples in flight from storage to workers, per stream. Large runs have one stream per node."""
    one_source_batches: bool = False
    """Takes all samples of a virtual rank in a step from a single source. heliostat turns this on if a source is a collection of
    buckets."""
    labels: dict[str, str] = {}
    """Ray labels of the nodes that fetch samples. Empty: any node."""
    document_mask: bool = False
    """Prevents attention between documents that are packed into one sample. Some models don't support this mask, see
    docs/training/document-masks.md"""

    @model_validator(mode="before")
    @classmethod
    def _take_path(cls, value: object) -> object:
        """Replaces `path` by a list of one source."""
        if not isinstance(value, dict) or not isinstance(value.get("path"), str):
            return value
        if "sources" in value:
            raise ValueError("path and sources are both set, but path is the short form of sources. Remove one of them")
        return {"sources": [{"path": value["path"]}]} | {key: part for key, part in value.items() if key != "path"}


BENCHMARK = "bench/"  # prefix of a benchmark score's name; the task's name follows


class Benchmarks(Strict):
    suite: str = Field(min_length=1)
    """Benchmark suite file (docs/benchmark.md), relative to the workspace."""
    every: Positive
    """Steps between two scored checkpoints: a multiple of `checkpoint.every`. The last checkpoint is always scored."""
    wait: Annotated[Float, Field(ge=0)] = 3600.0
    """Maximum seconds that the run waits for the last scores at its end."""


class Evaluate(Strict):
    every: Positive
    """Steps between two evaluations. The last step is always evaluated."""
    samples: Count = 256
    """Maximum number of held-out samples to score. If fewer held-out samples exist, heliostat logs a warning."""
    fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.01
    """Share of the documents or images to hold out, by the hash of their text or pixels. The run never trains on them. Shares of
    1, 2, and 5 divided by 10, 100, 1,000, or 10,000 are exact, see docs/data-order.md#exact-fractions"""
    benchmarks: Benchmarks | None = None
    """Scores checkpoints on benchmark tasks during training. Unset: none. See docs/benchmark.md#while-a-run-trains"""

    def due(self, done: int) -> bool:
        """Returns whether the model is evaluated after `done` steps."""
        return done % self.every == 0


class Best(Strict):
    metric: str = "loss"
    """Score to compare: the recipe's name for a score of the evaluation, or `bench/TASK` from `heliostat model benchmark
    --follow`."""
    mode: Literal["min", "max"] = "min"
    """Whether a low or a high score is better."""
    keep: Positive = 1
    """Number of checkpoints with the best scores to keep."""

    @property
    def is_late(self) -> bool:
        """Returns whether the score comes from a benchmark. Such a score is known only after the checkpoint is saved."""
        return self.metric.startswith(BENCHMARK)


class Checkpoint(Strict):
    every: Annotated[Positive, Filled("a tenth of `train.steps`, at most 1,000")]
    """Steps between two checkpoints."""
    keep: Positive = 2
    """Number of newest checkpoints to keep."""
    keep_every: Positive | None = None
    """Keeps checkpoints at multiples of this number of steps forever. Unset: none."""
    best: Best | None = None
    """Keeps the best checkpoints by a score, in addition to the newest checkpoints. Unset: none. See
    docs/checkpoints.md#what-is-kept"""
    grace: Annotated[Float, Field(gt=0)] = 60.0
    """Maximum seconds for the last checkpoint after SIGTERM, Ctrl-C, or a preemption notice."""
    memory_every: Positive | None = None
    """Steps between two in-memory checkpoints. The state of each node is kept on this node and on another node. After a failure,
    the run resumes from the newest in-memory checkpoint, and loses at most this number of steps. Unset: none. See
    docs/reliability/memory-checkpoints.md"""
    memory_limit: ByteSize = ByteSize(8 << 30)
    """Maximum bytes (`8GiB`) of each node's memory for in-memory checkpoints. If in-memory checkpoints need more, heliostat makes
    none, and logs a notice."""

    def due(self, done: int) -> bool:
        """Returns whether a checkpoint is saved after `done` steps."""
        return done % self.every == 0

    def copy_due(self, done: int) -> bool:
        """Returns whether an in-memory checkpoint is made after `done` steps."""
        return self.memory_every is not None and done % self.memory_every == 0


def _count(value: object) -> object:
    """Validates a number of workers, or a range [least, most]."""
    both = value if isinstance(value, list) else [value, value]
    counts = [n for n in both if isinstance(n, int) and not isinstance(n, bool)]
    if not len(both) == len(counts) == 2 or not 0 < counts[0] <= counts[1] <= LARGEST:
        raise ValueError(f"expected a number of workers, or [least, most], got {value!r}. Write 2 or [1, 4]")
    return value


class Workers(Strict):
    count: Annotated[int | list[int], BeforeValidator(_count)] = 1
    """Number of workers, or `[least, most]` for an elastic run, see docs/reliability/elastic.md"""
    cpus: Annotated[Float, Field(gt=0)] = 1.0
    """CPU cores per worker."""
    gpus: Annotated[Float, Field(ge=0), Filled("`auto`")] = 0.0
    """GPUs per worker: 1, or 0 to train on CPUs with gloo. `auto`: 1 if this machine, or the cluster file, has GPUs."""
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    """`pack`: on as few nodes as possible. `spread`: on as many nodes as possible. `strict_spread`: one worker per node."""
    labels: dict[str, str] = {}
    """Ray labels of the nodes for workers. Empty: any node."""

    @property
    def least(self) -> int:
        return self.count[0] if isinstance(self.count, list) else self.count

    @property
    def most(self) -> int:
        return self.count[1] if isinstance(self.count, list) else self.count


class Limits(Strict):
    hours: Annotated[Float, Field(gt=0)] | None = None
    """Maximum hours of the run, summed over all its commands. The time between two commands doesn't count. At the limit, the run
    saves a checkpoint and stops. To continue, use `--resume` with a higher limit. See docs/reliability/stop.md#limits"""
    cost: Annotated[Float, Field(gt=0)] | None = None
    """Maximum cost of the workers' devices, by the list prices and in the currency of `heliostat plan`."""


class Retries(Strict):
    max: Annotated[int, Field(ge=0)] = 10
    """Maximum consecutive failures without a new checkpoint. Preemptions don't count. See docs/reliability/failures.md"""
    backoff: NonNegative = 1.0
    """Seconds before the second consecutive retry. The first retry is immediate. Each further retry waits twice as long."""
    backoff_max: NonNegative = 60.0
    """Maximum seconds before a retry."""


class Watchdog(Strict):
    stall: Annotated[Float, Field(gt=0)] = 300.0
    """Maximum seconds without progress of any worker. Progress is a micro-batch, or a batch of an evaluation."""
    start: Annotated[Float, Field(gt=0)] = 1800.0
    """Maximum seconds without progress before the first step ends."""


class Mlflow(Strict):
    uri: Annotated[str, Filled("MLFLOW_TRACKING_URI, or `sqlite:///.heliostat/mlflow.db`")]
    """Tracking store: `sqlite:///FILE`, or `http://HOST:PORT`. The URI must not contain a password."""
    experiment: Annotated[Experiment, Filled("the job's name")]
    """Name of the experiment: up to 250 characters; no part between slashes is empty, `.` or `..`."""
    register_as: Name | None = Field(default=None, alias="register")
    """Name of the registered model; the run adds a version. Unset: the model is logged, but not registered."""
    alias: Name | None = None
    """Alias of the new version, for example `candidate`."""


class Card(Strict):
    """Describes the model for its users: the model card, which exports and registered models contain."""

    license: Name | None = None
    """SPDX identifier, for example `Apache-2.0`. Unset: the license of the parent model, or `unknown`."""
    summary: str = ""
    """Description of the model."""
    intended_use: str = ""
    """Intended use."""
    limitations: str = ""
    """Limitations: where not to use the model, and where it fails."""
