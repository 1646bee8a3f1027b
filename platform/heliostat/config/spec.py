"""Defines the job file: one YAML is the whole job. `load` validates it; `docs/job.md` explains every key.

Cross-field rules are checked here too, so a Job that exists can be trained: the batch divides, the combination of precision, ZeRO
stage and hardware trains correctly, offload fits the stage.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, field_validator, model_validator

from heliostat.config import optimizers, schema, workspace
from heliostat.config.optimizers import AnyOptimizer
from heliostat.config.schedules import Schedule
from heliostat.config.schema import Float, Strict
from heliostat.errors import ConfigError
from heliostat.redact import carries_secret
from heliostat.storage import Location
from heliostat.text import printable

LARGEST = 2**32  # of what is counted by the step; what is beyond it is a slip of the finger
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random number generator takes
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


def _experiment(name: str) -> str:
    """Validates an experiment's name: MLflow takes any; ours may become a folder, and stands in a terminal and a page."""
    parts = name.removeprefix("/").split("/")  # Databricks' begin with one
    if not name.strip() or len(name) > 250 or printable(name) != name or "\\" in name or {"", ".", ".."} & set(parts):
        raise ValueError(
            f"{printable(name[:60])!r} is no experiment's name: up to 250 characters, none of them a control character or \\, "
            "and no part between slashes empty, . or .."
        )
    return name


Experiment = Annotated[str, AfterValidator(_experiment)]


class Source(Strict):
    path: str
    """A prepared dataset, or a collection of them: a folder, or `s3://bucket/prefix`."""
    weight: NonNegative = 1.0
    """Its share of the samples, relative to the other sources'."""
    max_epochs: Annotated[Float, Field(gt=0)] | None = None
    """So many passes over it; then it is left out, and the other sources share its weight. Unset: no limit."""


class MixChange(Strict):
    step: Positive
    """The weights hold for all steps behind this one."""
    weights: list[NonNegative]
    """One for each source, in the order of `data.sources`."""


class Data(Strict):
    sources: Annotated[list[Source], Field(min_length=1)]
    """The datasets that are mixed, each path once."""
    sequence_length: Annotated[int, Field(gt=1)] | None = None
    """Tokens in a sample. Needed where the datasets hold tokens; images have none."""
    seed: Seed = 0
    """Of the order of samples."""
    lanes: Count | None = None
    """Canonical data-parallel ranks, fixed for the run: any number of workers that divides them can continue it. Unset: one
    for each micro-batch of a step (`train.global_batch` / `train.micro_batch`)."""
    window: Positive | None = None
    """Samples that are shuffled together, and fetched by one task. Unset: 32 MB of them."""
    mix_schedule: list[MixChange] = []
    """A curriculum: other weights behind a step, in ascending order of steps. A source may start with weight 0."""
    on_bad_sample: Literal["replace", "fail"] = "replace"
    """`replace`: a damaged chunk's samples are replaced by others of their window, counted and listed; `fail`: the run stops.
    See docs/data-order.md#bad-data"""
    max_bad_fraction: Fraction = 0.01
    """Replaced samples, as a share of an epoch's (or of all that were trained on, if more), beyond which the run stops."""
    memory_limit: ByteSize = ByteSize(2 << 30)
    """Bytes (`512MiB`) for samples on their way from storage to the workers, on the whole cluster."""
    one_source_batches: bool = False
    """A lane's samples of a step all come from one source. Set by itself where a source is a collection of buckets."""
    labels: dict[str, str] = {}
    """Only nodes that carry these Ray labels fetch samples. Empty: any node."""
    document_mask: bool = False
    """Packed documents do not see each other. Refused for models in which they do, see docs/job.md#what-the-check-tries"""


class Offload(Strict):
    optimizer: Literal["cpu"] | None = None
    """Masters and moments live in host memory."""
    param: Literal["cpu", "nvme"] | None = None
    """Weights live in host memory, or on NVMe. ZeRO stage 3 only."""
    nvme_path: str | None = None
    """A folder on the node's NVMe, for `param: nvme`."""


class Zero(Strict):
    stage: Literal[0, 1, 2, 3] = 1
    """What is divided among the workers. 0: nothing; 1: optimizer state; 2: gradients, too; 3: weights, too. Stage 0 needs
    `precision: fp32`."""
    offload: Offload = Offload()
    """What is moved out of GPU memory."""

    @field_validator("stage", mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        if isinstance(value, bool):  # equal to 0 or 1, and so to a choice
            raise ValueError(f"{value} is not a choice; valid: 0, 1, 2, 3")
        return value


class Ema(Strict):
    decay: Annotated[Float, Field(gt=0, lt=1)] = 0.9999
    """Of the average, at most; at step t it is min(decay, (1 + t) / (10 + t))."""


class Train(Strict):
    steps: Positive
    """Optimizer steps of the whole run. They count from 1; the schedule ends at this one."""
    stop_after: Positive | None = None
    """Training ends behind this step, for now; the schedule follows `steps` all the same. Unset: at `steps`."""
    global_batch: Count
    """Samples of an optimizer step, whatever the number of workers."""
    micro_batch: Count
    """Samples that a worker plays at once; the number of accumulated micro-batches follows."""
    optimizer: AnyOptimizer
    """What makes a step of the gradients."""
    schedule: Schedule = Schedule()
    """The learning rate over the steps."""
    grad_clip: NonNegative = 1.0
    """Limit of the gradient's global norm; 0 for none."""
    ema: Ema | None = None
    """An average of the weights over the steps, which is evaluated, drawn from and exported in their place. Unset: no average."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of weights and computing; masters and moments are fp32 in all. `fp16` needs GPUs. See docs/job.md#precision"""
    zero: Zero = Zero()
    """DeepSpeed's ZeRO: how the state is divided among the workers."""
    accumulate: Literal["fp32", "same"] | None = None
    """What a step's micro-batches are summed in: fp32, or the `same` as `train.precision`. Unset: fp32, but a resumed run
    keeps what it had. See docs/job.md#sums-of-micro-batches"""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own settings of speed and memory, merged over what the keys above make. Which:
    docs/job.md#deepspeeds-own-keys"""
    activation_checkpointing: bool = False
    """Computes activations again in the backward pass, which trades time for memory."""
    compile: bool = False
    """Runs the model through `torch.compile`."""
    cpu_kernels: bool = True
    """Computes on CPUs what is faster so than with torch's own kernels: attention of samples of up to 512 tokens in some
    architectures, and linear layers in fp32. No effect with GPUs. See docs/benchmarks/train-overhead.md#cpu-kernels"""
    seed: Seed = 0
    """Of initial weights and dropout."""
    log_every: Positive = 10
    """Steps between two lines of progress; every step's loss is recorded all the same."""


class Evaluate(Strict):
    every: Positive
    """Steps between two evaluations. The last step is always evaluated."""
    samples: Positive = 256
    """Held-out samples that are scored, at most; where there are fewer, the run says so."""
    fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.01
    """Share of the documents that is held out by the hash of their text, and never trained on. 1, 2 and 5 parts of ten to ten
    thousand are exact, see docs/data-order.md#what-is-held-out"""


class Best(Strict):
    metric: str = "loss"
    """A score of the evaluation, as the recipe reports it."""
    mode: Literal["min", "max"] = "min"
    """Whether a low or a high score is good."""
    keep: Positive = 1
    """So many checkpoints with the best scores stay."""


class Checkpoint(Strict):
    every: Positive
    """Steps between two checkpoints."""
    keep: Positive = 2
    """So many of the newest stay."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of so many steps stay for ever. Unset: no such rule."""
    best: Best | None = None
    """The best by a score stay, too. Unset: no such rule. See docs/checkpoints.md#what-is-kept"""
    grace: Annotated[Float, Field(gt=0)] = 60.0
    """Seconds for the last checkpoint after SIGTERM, Ctrl-C or a preemption notice."""


def _count(value: object) -> object:
    """Validates a number of workers, or [least, most]."""
    both: list[Any] = value if isinstance(value, list) else [value, value]
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in both)
    if len(both) != 2 or not whole or not 0 < both[0] <= both[1] <= LARGEST:
        raise ValueError(f"{value!r} is neither a number of workers nor [least, most], as [1, 4]")
    return value


class Workers(Strict):
    count: Annotated[int | list[int], BeforeValidator(_count)] = 1
    """How many; or `[least, most]` for an elastic run, see docs/reliability.md#elastic-runs"""
    cpus: Annotated[Float, Field(gt=0)] = 1.0
    """Cores of each."""
    gpus: Annotated[Float, Field(ge=0)] = 0.0
    """GPUs of each; 0 trains on CPUs with gloo."""
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


class Retries(Strict):
    max: Annotated[int, Field(ge=0)] = 10
    """Failures in a row without a new checkpoint between them. Preemptions do not count. See
    docs/reliability.md#what-is-tried-again"""
    backoff: NonNegative = 1.0
    """Seconds before the first retry; each one in a row waits twice as long as the one before."""
    backoff_max: NonNegative = 60.0
    """The longest wait, in seconds."""


class Watchdog(Strict):
    stall: Annotated[Float, Field(gt=0)] = 300.0
    """Seconds in which some worker must get on: by a step, or a batch of an evaluation."""
    start: Annotated[Float, Field(gt=0)] = 1800.0
    """The same before the first step is done."""


class Spike(Strict):
    window: Annotated[int, Field(ge=4)] = 50
    """Steps whose losses say what is usual."""
    threshold: Annotated[Float, Field(gt=0)] = 8.0
    """Robust standard deviations above their median, from which on a loss is a spike."""
    action: Literal["warn", "rollback"] = "warn"
    """`warn`: say so and go on; `rollback`: go back to the checkpoint before it, and leave the samples at fault out."""


class Mlflow(Strict):
    uri: str
    """The tracking store: `sqlite:///FILE`, or `http://HOST:PORT`. It never holds a password."""
    experiment: Experiment
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


class Job(Strict):
    name: Name
    """The run: its folder is `storage/name`, and `--resume` goes on with it."""
    recipe: str
    """Import path of the recipe: the class that says what is trained."""
    model: dict[str, Any]
    """The recipe's own keys. CausalLM: `arch` and any key of that architecture's `transformers` config, or `pretrained:
    FOLDER`, whose tokenizer must be the datasets' (compared by content). TextToImage and Autoencoder: see
    docs/diffusion.md#models"""
    data: Data
    """What is trained on, and in which order."""
    train: Train
    """How it is trained."""
    evaluate: Evaluate | None = None
    """Scores on samples that are never trained on. Unset: no evaluation."""
    checkpoint: Checkpoint
    """When the state is saved, and which checkpoints stay."""
    workers: Workers = Workers()
    """The processes that train, and where they may be."""
    retries: Retries = Retries()
    """How often the run tries again by itself."""
    watchdog: Watchdog = Watchdog()
    """When a run that stands still is ended and tried again."""
    spike: Spike | None = None
    """What is done about loss spikes, see docs/reliability.md#loss-spikes. Unset: nothing."""
    storage: str
    """Where runs live: a folder, or `s3://bucket/prefix`."""
    mlflow: Mlflow
    """Where the run is recorded, see docs/mlflow.md"""
    card: Card = Card()
    """The model card, which travels with the model."""

    @property
    def last_step(self) -> int:
        """Returns the step where the training ends."""
        return min(self.train.steps, self.train.stop_after or self.train.steps)

    @property
    def accumulation(self) -> int:
        """Returns the number of micro-batches of a worker in a step, for a job of a fixed number of workers."""
        assert isinstance(self.workers.count, int)
        return self.train.global_batch // (self.workers.count * self.train.micro_batch)

    def worker_counts(self, lanes: int | None = None) -> list[int]:
        """Lists the numbers of workers, ascending, that the job allows and that can play its lanes (of a run resumed: its
        `lanes`)."""
        return _fitting(self, lanes or self.lanes, self.workers.least, self.workers.most)

    def on(self, workers: int) -> Job:
        """Copies the job, with this fixed number of workers."""
        return self.model_copy(update={"workers": self.workers.model_copy(update={"count": workers})})

    @property
    def lanes(self) -> int:
        return self.data.lanes or self.train.global_batch // self.train.micro_batch

    @property
    def run_folder(self) -> Location:
        return Location(self.storage).join(self.name)

    @property
    def sources(self) -> list[Location]:
        return [Location(s.path) for s in self.data.sources]

    def dump(self) -> dict[str, Any]:
        """Dumps the resolved job as plain data, in the shape of the file."""
        return json.loads(self.model_dump_json(by_alias=True))

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        faults = [*_batch_faults(self), *_precision_faults(self), *_offload_faults(self), *_checkpoint_faults(self)]
        faults += _mix_faults(self.data) + _mlflow_faults(self.mlflow)
        paths = [s.path for s in self.data.sources]
        if len(set(paths)) < len(paths):
            faults.append("data.sources: a path is given twice; add up its weights")
        if self.train.schedule.warmup_steps >= self.train.steps:
            faults.append(
                f"train.schedule.warmup_steps: {self.train.schedule.warmup_steps} must be below train.steps {self.train.steps}"
            )
        if faults:
            raise ValueError("\n  ".join(faults))
        return self


def _fitting(job: Job, lanes: int, least: int, most: int) -> list[int]:
    """Lists the numbers of workers in [least, most] that can play the lanes in whole micro-batches."""
    batch, micro = job.train.global_batch, job.train.micro_batch
    return [n for n in divisors(math.gcd(lanes, batch)) if least <= n <= most and batch // n % micro == 0]


def divisors(number: int) -> list[int]:
    """Lists a number's divisors, ascending; only 1 for a number beyond LARGEST, whose square root is too far to try."""
    if number > LARGEST:
        return [1]
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def _batch_faults(job: Job) -> list[str]:
    batch, micro, count = job.train.global_batch, job.train.micro_batch, job.workers.count
    if isinstance(count, list):
        return _elastic_faults(job)
    if batch % (micro * count):
        fits = [n for n in divisors(batch // micro) if n < 2 * count] if batch % micro == 0 else []
        below, above = count * micro * (batch // (count * micro)), count * micro * (batch // (count * micro) + 1)
        near = f"use a global batch of {' or '.join(str(b) for b in (below, above) if b)}"
        workers = f", or workers.count {min(fits, key=lambda n: abs(n - count))}" if fits else ""
        return [
            f"train.global_batch: {batch} is not divisible by workers.count {count} x train.micro_batch {micro}; {near}{workers}"
        ]
    if batch % job.lanes or job.lanes % count:
        fits = [count * d for d in divisors(batch // count)]
        return [
            f"data.lanes: {job.lanes} must divide train.global_batch {batch} and be a multiple of workers.count {count}; "
            f"nearest: {min(fits, key=lambda c: abs(c - job.lanes))}"
        ]
    if (batch // count) % micro:
        return [f"train.micro_batch: {micro} does not divide the {batch // count} samples that a worker gets in a step"]
    return []


def _elastic_faults(job: Job) -> list[str]:
    batch, lanes, workers = job.train.global_batch, job.lanes, job.workers
    if batch % lanes:
        near = min(divisors(batch), key=lambda c: abs(c - lanes))
        return [f"data.lanes: {lanes} must divide train.global_batch {batch}; nearest: {near}"]
    if job.worker_counts():
        return []
    nearest = min(_fitting(job, lanes, 1, lanes), key=lambda n: abs(n - workers.least), default=None)
    return [
        f"workers.count: from {workers.least} to {workers.most} there is no number that divides the {lanes} lanes into whole "
        f"micro-batches; {f'nearest: {nearest}' if nearest else 'train.micro_batch must divide train.global_batch'}"
    ]


def _mix_faults(data: Data) -> list[str]:
    faults, before = [], 0
    for i, change in enumerate(data.mix_schedule):
        key = f"data.mix_schedule.{i}"
        if len(change.weights) != len(data.sources):
            faults.append(f"{key}.weights: {len(change.weights)} given, one for each of the {len(data.sources)} sources wanted")
        if change.step <= before:
            faults.append(f"{key}.step: {change.step} must be above {before}; list the changes in the order of their steps")
        before = change.step
    mixes = [[s.weight for s in data.sources], *(c.weights for c in data.mix_schedule)]
    for i, weights in enumerate(mixes):
        if not any(weights):
            faults.append(f"{f'data.mix_schedule.{i - 1}.weights' if i else 'data.sources'}: all weights are 0")
    for i in range(len(data.sources)):
        if not any(weights[i] for weights in mixes if i < len(weights)):
            faults.append(f"data.sources.{i}.weight: is 0 at every step; remove the source, or give it a weight")
    return faults


def _precision_faults(job: Job) -> list[str]:
    faults = []
    if job.train.precision == "fp16" and not job.workers.gpus:
        faults.append("train.precision: 'fp16' needs GPUs (workers.gpus is 0); use bf16 or fp32")
    if job.train.precision == "bf16" and job.train.zero.stage == 0:
        faults.append("train.zero.stage: 0 with train.precision 'bf16' trains wrongly in DeepSpeed; use stage 1, or fp32")
    if job.train.precision == "fp16" and job.train.zero.stage == 0:
        faults.append("train.zero.stage: 0 with train.precision 'fp16' has no masters that a checkpoint could hold; use stage 1")
    if job.train.accumulate == "fp32" and _sums_on_host(job):
        where = f"train.zero.offload.optimizer at train.zero.stage {job.train.zero.stage}"
        faults.append(
            f"train.accumulate: fp32 with {where}: DeepSpeed sums in host memory in low precision; use stage 3, or same"
        )
    return faults


def _sums_on_host(job: Job) -> bool:
    return bool(job.train.zero.offload.optimizer) and job.train.zero.stage in (1, 2) and job.train.precision != "fp32"


def _offload_faults(job: Job) -> list[str]:
    zero, offload = job.train.zero, job.train.zero.offload
    faults = []
    if offload.optimizer and zero.stage == 0:
        faults.append("train.zero.offload.optimizer: needs train.zero.stage 1, 2 or 3")
    if offload.param and zero.stage != 3:
        faults.append(f"train.zero.offload.param: needs train.zero.stage 3, not {zero.stage}")
    if (offload.param == "nvme") != bool(offload.nvme_path):
        faults.append("train.zero.offload.nvme_path: give the folder when, and only when, param is 'nvme'")
    return faults


def _mlflow_faults(mlflow: Mlflow) -> list[str]:
    faults = []
    if carries_secret(mlflow.uri):
        faults.append(
            "mlflow.uri: must not carry a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN (for PostgreSQL: PGPASSWORD; for MySQL: ?read_default_file=FILE)"
        )
    if mlflow.alias and not mlflow.register_as:
        faults.append(f"mlflow.alias: {mlflow.alias!r} is of a registered model; set mlflow.register too")
    return faults


def _checkpoint_faults(job: Job) -> list[str]:
    policy, faults = job.checkpoint, []
    if policy.keep_every and policy.keep_every % policy.every:
        near = policy.every * max(1, round(policy.keep_every / policy.every))
        faults.append(
            f"checkpoint.keep_every: {policy.keep_every} must be a multiple of checkpoint.every {policy.every}; nearest: {near}"
        )
    if policy.best and not job.evaluate:
        faults.append("checkpoint.best: needs scores; add evaluate, or remove checkpoint.best")
    elif policy.best and job.evaluate and policy.every % job.evaluate.every:  # a score must be of the very step
        faults.append(
            f"checkpoint.best: evaluate.every {job.evaluate.every} must divide checkpoint.every {policy.every}, "
            "so that each checkpoint is scored"
        )
    if policy.best and policy.best.metric == "train_loss":
        faults.append("checkpoint.best.metric: 'train_loss' is of the training data; name a score of the evaluation, as loss")
    return faults


def load(path: Path, settings: list[str] | None = None) -> Job:
    """Loads the job in a YAML file, with `key.path=value` settings applied and relative paths taken from the workspace."""
    return resolve(schema.load(Job, "job", path, settings))


def settle(job: Job, recorded: dict[str, Any] | None) -> Job:
    """Settles the job's `train.accumulate`: its own value, else that of the run that it resumes (`same` for runs from before
    there was the key), else fp32 where it can be had. ConfigError if the run cannot go on with the job's optimizer."""
    if recorded is not None:
        optimizers.require_resumable(job.train.optimizer, recorded["train"].get("optimizer", {}))
    if job.train.accumulate:
        return job
    value = "fp32" if recorded is None else recorded["train"].get("accumulate") or "same"
    if _sums_on_host(job):
        value = "same"
    return job.model_copy(update={"train": job.train.model_copy(update={"accumulate": value})})


def resolve(job: Job) -> Job:
    """Makes every path absolute, because Ray's workers run in other folders."""
    root = workspace.root()
    raw = job.dump()
    for i, source in enumerate(raw["data"]["sources"]):
        source["path"] = _absolute(f"data.sources.{i}.path", source["path"], root)
    raw["storage"] = _absolute("storage", job.storage, root)
    raw["model"] = _pretrained(raw["model"], root)
    uri = job.mlflow.uri
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raw["mlflow"]["uri"] = f"sqlite:///{root / uri.removeprefix('sqlite:///')}"
    elif not uri.startswith(("sqlite:", "http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        raise ConfigError(f"mlflow.uri: {uri!r} is no MLflow store; use sqlite:///FILE or http://HOST:PORT")
    return schema.validate(Job, raw, job.name)  # again, because two ways to write a path are now one


def _pretrained(model: Any, root: Path) -> Any:
    """Makes every `pretrained: FOLDER` in the recipe's keys absolute, however deep."""
    if not isinstance(model, dict):
        return model
    return {k: str(root / v) if k == "pretrained" and isinstance(v, str) else _pretrained(v, root) for k, v in model.items()}


def _absolute(key: str, path: str, root: Path) -> str:
    try:
        return str(Location(path).absolute(root))
    except ConfigError as e:
        raise ConfigError(f"{key}: {e}") from e
