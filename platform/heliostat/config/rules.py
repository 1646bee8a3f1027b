"""Checks what the sections of a job must be to each other: the batch divides, precision, ZeRO stage and hardware train correctly
together, offload fits the stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from heliostat.config.fields import divisors
from heliostat.config.sections import Checkpoint, Data, Evaluate, Mlflow, Workers
from heliostat.config.train_section import SELECTIVE, Train
from heliostat.redact import carries_secret


class Ruled(Protocol):
    """Lists what the rules read of a job (`spec.Job`)."""

    @property
    def data(self) -> Data: ...
    @property
    def train(self) -> Train: ...
    @property
    def evaluate(self) -> Evaluate | None: ...
    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def workers(self) -> Workers: ...
    @property
    def mlflow(self) -> Mlflow: ...
    @property
    def virtual_ranks(self) -> int: ...
    @property
    def replicas(self) -> int: ...
    def worker_counts(self) -> list[int]: ...


def faults(job: Ruled) -> list[str]:
    """Lists what is wrong, a line each that begins with the key."""
    groups = (_sequence_faults, _expert_faults, _tensor_faults, _many_nodes_faults, _batch_faults)  # of these, the first fault's
    others = (_memory_faults, _precision_faults, _offload_faults, _checkpoint_faults, _attention_faults, _fp8_faults,
              _optimizer_faults, _mix_faults, _mlflow_faults, _step_faults)  # fmt: skip
    first = next((lines for rule in groups if (lines := list(rule(job)))), [])
    return first + [line for rule in others for line in rule(job)]


def _step_faults(job: Ruled) -> Iterator[str]:
    paths, schedule = [s.path for s in job.data.sources], job.train.schedule
    if len(set(paths)) < len(paths):
        yield "data.sources: a path is given twice; add up its weights"
    if schedule.warmup_steps >= job.train.steps:
        yield f"train.schedule.warmup_steps: {schedule.warmup_steps} must be below train.steps {job.train.steps}"


def _sequence_faults(job: Ruled) -> Iterator[str]:
    each, train = job.train.parallel.sequence, job.train
    if each == 1:
        return
    key = f"train.parallel.sequence: {each}"
    yield from _group_faults(key, each, job)
    length = job.data.sequence_length
    if not length:
        yield f"{key} cuts samples of data.sequence_length tokens, and the job has none; remove it"
    elif length % each:
        near = " or ".join(map(str, _multiples(length, each)))
        yield f"{key} does not divide data.sequence_length {length}; use a length of {near}"
    if train.compile:
        yield f"{key} with train.compile is not tried; set train.compile to false"
    if train.sdc_check:
        yield f"{key} with train.sdc_check: workers compare what each computes of a whole sample; remove train.sdc_check"


def _group_faults(key: str, each: int, job: Ruled) -> list[str]:
    """Lists what keeps workers from being in groups of `each`."""
    workers = job.workers
    if isinstance(workers.count, int) and workers.count % each:
        near = " or ".join(map(str, _multiples(workers.count, each)))
        return [f"{key} does not divide workers.count {workers.count}; use {near} workers"]
    if workers.most // each * each < workers.least:
        return [f"{key}: there is no multiple of it from workers.count {workers.least} to {workers.most}"]
    return []


def _multiples(number: int, of: int) -> list[int]:
    """Lists the multiples of a number that are nearest to another: the one below it, unless that is 0, and the one above."""
    return [n for n in (number // of * of, (number // of + 1) * of) if n]


def _untried(key: str, others: Mapping[str, object]) -> list[str]:
    """Lists those of the other settings, by name, that are made, and were never tried with a key."""
    return [f"{key} with {other} is not tried; remove one of them" for other, is_set in others.items() if is_set]


def _expert_faults(job: Ruled) -> Iterator[str]:
    each, train = job.train.parallel.expert, job.train
    if each == 1:
        return
    key = f"train.parallel.expert: {each}"
    yield from _group_faults(key, each, job)
    if train.zero.stage != 3:
        yield f"{key} needs train.zero.stage 3, which divides what is not of experts; set it"
    yield from _untried(key, _unshared(train))


def _tensor_faults(job: Ruled) -> Iterator[str]:
    each, train = job.train.parallel.tensor, job.train
    if each == 1:
        return
    key = f"train.parallel.tensor: {each}"
    yield from _group_faults(key, each, job)
    if train.zero.stage == 3:
        yield f"{key} with train.zero.stage 3 is not tried, which divides every matrix over all workers by itself; use 1 or 2"
    own = {
        "train.parallel.expert": train.parallel.expert > 1,
        "train.tiled_mlp": train.tiled_mlp,
        "train.precision: fp16": train.precision == "fp16",
    }
    yield from _untried(key, own | _unshared(train))


def _unshared(train: Train) -> dict[str, object]:
    """Tells of the settings that were never tried where workers share experts or matrices, by name, whether they are made."""
    return {
        "train.parallel.sequence": train.parallel.sequence > 1,
        "train.compile": train.compile,
        "train.sdc_check": train.sdc_check,
        "train.zero.offload": train.zero.offload.optimizer or train.zero.offload.param,
        f"train.optimizer.name: {train.optimizer.name}": train.optimizer.orthogonalizes,
    }


def _many_nodes_faults(job: Ruled) -> Iterator[str]:
    """Lists what is wrong with the ways in which fewer bytes travel between nodes."""
    train, zero = job.train, job.train.zero
    options = {
        "shard_group_size": zero.shard_group_size,
        "hpz_partition_size": zero.hpz_partition_size,
        "quantize_weights": zero.quantize_weights,
    }
    untried = {
        "train.parallel": train.parallel.sharing > 1 or train.parallel.expert > 1,
        "train.zero.offload.param": zero.offload.param,
        "train.compile": train.compile,
        "train.sdc_check": train.sdc_check,
    }
    for name, each in options.items():
        key = f"train.zero.{name}: {str(each).lower()}"
        if not each:
            continue
        if zero.stage != 3:
            yield f"{key} is of weights that are divided, and needs train.zero.stage 3, not {zero.stage}"
        if not isinstance(each, bool):
            yield from _group_faults(key, each, job)
        yield from _untried(key, untried)
    if zero.shard_group_size and zero.hpz_partition_size:
        yield "train.zero.hpz_partition_size: with train.zero.shard_group_size all weights are within a group already; remove it"
    if zero.shard_group_size and zero.offload.optimizer:
        yield "train.zero.shard_group_size: with train.zero.offload.optimizer is not tried; remove one of them"
    if zero.shard_group_size and train.optimizer.orthogonalizes:
        yield f"train.zero.shard_group_size: with train.optimizer.name {train.optimizer.name!r} is not tried; remove it"
    if zero.quantize_weights and not job.workers.gpus:
        yield "train.zero.quantize_weights: true needs GPUs (workers.gpus is 0), whose kernels round; set it to false"
    if zero.quantize_weights and zero.shard_group_size:
        yield "train.zero.quantize_weights: with train.zero.shard_group_size is not tried; remove one of them"


def _memory_faults(job: Ruled) -> Iterator[str]:
    """Lists what is wrong with the ways to save memory that a job asks for."""
    train = job.train
    options = {"tiled_loss": train.tiled_loss, "tiled_mlp": train.tiled_mlp, "activation_offload": train.activation_offload}
    for key, on in options.items():
        if on and train.compile:
            yield f"train.{key}: true with train.compile is not tried; set one of them to false"
    if train.activation_checkpointing == SELECTIVE:
        yield from _untried(f"train.activation_checkpointing: {SELECTIVE}", untried_selective(job))
    if train.activation_offload and not train.activation_checkpointing:
        yield "train.activation_offload: moves what train.activation_checkpointing keeps; set that, too"


def untried_selective(job: Ruled) -> dict[str, bool]:
    """Tells of the settings that were never tried with selective checkpointing, by name, whether a job makes them."""
    train = job.train
    return {
        "train.activation_offload": train.activation_offload,
        "train.compile": bool(train.compile),
        "train.fp8": train.fp8,
        "train.attention: flex_attention": train.attention == "flex_attention",
        "train.parallel.tensor": train.parallel.tensor > 1,
        "train.parallel.expert": train.parallel.expert > 1,
    }


def _batch_faults(job: Ruled) -> list[str]:
    if isinstance(job.workers.count, list):
        return _elastic_faults(job)
    parallel = job.train.parallel
    batch, micro, each = job.train.global_batch_size, job.train.micro_batch_size, parallel.sharing
    shared = f" / train.parallel.{'tensor' if parallel.tensor > 1 else 'sequence'} {each}" if each > 1 else ""
    count, named = job.replicas, f"workers.count {job.workers.count}{shared}"
    if batch % (micro * count):
        fits = [n for n in divisors(batch // micro) if n < 2 * count] if batch % micro == 0 else []
        near = f"use a global batch of {' or '.join(map(str, _multiples(batch, count * micro)))}"
        workers = f", or workers.count {each * min(fits, key=lambda n: abs(n - count))}" if fits else ""
        return [f"train.global_batch_size: {batch} is not divisible by {named} x train.micro_batch_size {micro}; {near}{workers}"]
    if batch % job.virtual_ranks or job.virtual_ranks % count:
        fits = [count * d for d in divisors(batch // count)]
        return [
            f"data.virtual_ranks: {job.virtual_ranks} must divide train.global_batch_size {batch} and be a multiple of {named}; "
            f"nearest: {min(fits, key=lambda c: abs(c - job.virtual_ranks))}"
        ]
    if (batch // count) % micro:
        return [f"train.micro_batch_size: {micro} does not divide the {batch // count} samples that a worker gets in a step"]
    return []


def _elastic_faults(job: Ruled) -> list[str]:
    batch, lanes, workers = job.train.global_batch_size, job.virtual_ranks, job.workers
    if batch % lanes:
        near = min(divisors(batch), key=lambda c: abs(c - lanes))
        return [f"data.virtual_ranks: {lanes} must divide train.global_batch_size {batch}; nearest: {near}"]
    if job.worker_counts():
        return []
    most = lanes * job.train.parallel.sharing
    nearest = min(job.train.worker_counts(lanes, 1, most), key=lambda n: abs(n - workers.least), default=None)
    return [
        f"workers.count: from {workers.least} to {workers.most} there is no number that divides the {lanes} lanes into whole "
        f"micro-batches; {f'nearest: {nearest}' if nearest else 'train.micro_batch_size must divide train.global_batch_size'}"
    ]


def _mix_faults(job: Ruled) -> Iterator[str]:
    data, before = job.data, 0
    for i, change in enumerate(data.mix_schedule):
        key = f"data.mix_schedule.{i}"
        if len(change.weights) != len(data.sources):
            yield f"{key}.weights: {len(change.weights)} given, one for each of the {len(data.sources)} sources wanted"
        if change.step <= before:
            yield f"{key}.step: {change.step} must be above {before}; list the changes in the order of their steps"
        before = change.step
    mixes = [[s.weight for s in data.sources], *(c.weights for c in data.mix_schedule)]
    empty = [i for i, weights in enumerate(mixes) if not any(weights)]
    for i in empty:
        yield f"{f'data.mix_schedule.{i - 1}.weights' if i else 'data.sources'}: all weights are 0. Give one source a weight"
    for i in range(len(data.sources)):
        if not empty and not any(weights[i] for weights in mixes if i < len(weights)):
            yield f"data.sources.{i}.weight: is 0 at every step; remove the source, or give it a weight"


def _precision_faults(job: Ruled) -> Iterator[str]:
    if job.train.precision == "fp16" and not job.workers.gpus:
        yield "train.precision: 'fp16' needs GPUs (workers.gpus is 0); use bf16 or fp32"
    if job.train.compile == "blocks" and job.train.zero.stage == 3:
        yield (
            "train.compile: blocks with train.zero.stage 3, which gathers weights inside each layer, was not seen to finish "
            "compiling; use stage 2, or set train.compile to true or false"
        )
    if job.train.precision == "bf16" and job.train.zero.stage == 0:
        yield "train.zero.stage: 0 with train.precision 'bf16' trains wrongly in DeepSpeed; use stage 1, or fp32"
    if job.train.precision == "fp16" and job.train.zero.stage == 0:
        yield "train.zero.stage: 0 with train.precision 'fp16' has no masters that a checkpoint could hold; use stage 1"
    if job.train.grad_accum_dtype == "fp32" and sums_on_host(job):
        where = f"train.zero.offload.optimizer at train.zero.stage {job.train.zero.stage}"
        yield f"train.grad_accum_dtype: fp32 with {where}: DeepSpeed sums in host memory in low precision; use stage 3, or same"


def _attention_faults(job: Ruled) -> Iterator[str]:
    train, name = job.train, job.train.attention
    if name is None or name in ("sdpa", "eager"):
        return
    key = f"train.attention: {name!r}"
    if not job.workers.gpus:
        yield f"{key} needs GPUs (workers.gpus is 0); use sdpa, which computes the same"
    if train.parallel.sequence > 1:
        yield f"{key} with train.parallel.sequence is not tried; use sdpa"
    if name.startswith("flash"):
        if train.precision == "fp32":
            yield f"{key} computes in bf16 and fp16 alone; set train.precision, or use sdpa"
        if job.data.document_mask and train.micro_batch_size > 1:
            yield (
                f"{key} with data.document_mask keeps documents apart in a micro-batch of one sample alone, and "
                f"train.micro_batch_size is {train.micro_batch_size}; set it to 1 (with longer samples), or use flex_attention"
            )


def _fp8_faults(job: Ruled) -> list[str]:
    train = job.train
    if not train.fp8:
        return []
    wrong = {
        "needs GPUs (workers.gpus is 0)": not job.workers.gpus,
        f"with train.precision {train.precision!r}: what is not multiplied in float8 is to be bf16": train.precision != "bf16",
        "with train.parallel is not tried": train.parallel.sharing > 1 or train.parallel.expert > 1,
        "with train.tiled_mlp is not tried": train.tiled_mlp,
    }
    return [f"train.fp8: true {why}; set it to false, or change that" for why, is_so in wrong.items() if is_so]


def _optimizer_faults(job: Ruled) -> Iterator[str]:
    optimizer = job.train.optimizer
    if optimizer.averages and job.train.schedule.name != "constant":
        name = job.train.schedule.name
        yield f"train.schedule.name: {name!r} with optimizer {optimizer.name!r}, whose average takes its place; use constant"
    if optimizer.averages and job.train.ema:
        yield f"train.ema: optimizer {optimizer.name!r} keeps an average of the weights itself; remove train.ema"
    if optimizer.orthogonalizes and job.train.zero.offload.param == "nvme":
        yield f"train.zero.offload.param: nvme with optimizer {optimizer.name!r} is not known to train right; use cpu"


def sums_on_host(job: Ruled) -> bool:
    return bool(job.train.zero.offload.optimizer) and job.train.zero.stage in (1, 2) and job.train.precision != "fp32"


def _offload_faults(job: Ruled) -> Iterator[str]:
    zero, offload = job.train.zero, job.train.zero.offload
    if offload.optimizer and zero.stage == 0:
        yield "train.zero.offload.optimizer: needs train.zero.stage 1, 2 or 3"
    if offload.param and zero.stage != 3:
        yield f"train.zero.offload.param: needs train.zero.stage 3, not {zero.stage}"
    if (offload.param == "nvme") != bool(offload.nvme_path):
        yield "train.zero.offload.nvme_path: give the folder when, and only when, param is 'nvme'"


def _mlflow_faults(job: Ruled) -> Iterator[str]:
    mlflow = job.mlflow
    if carries_secret(mlflow.uri):
        yield (
            "mlflow.uri: must not carry a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN (for PostgreSQL: PGPASSWORD; for MySQL: ?read_default_file=FILE)"
        )
    if mlflow.alias and not mlflow.register_as:
        yield f"mlflow.alias: {mlflow.alias!r} is of a registered model; set mlflow.register too"


def _checkpoint_faults(job: Ruled) -> Iterator[str]:
    policy = job.checkpoint
    benchmarks = job.evaluate.benchmarks if job.evaluate else None
    rare = {"checkpoint.keep_every": policy.keep_every, "evaluate.benchmarks.every": benchmarks.every if benchmarks else None}
    for key, every in rare.items():
        if every and every % policy.every:
            near = policy.every * max(1, round(every / policy.every))
            yield f"{key}: {every} must be a multiple of checkpoint.every {policy.every}; nearest: {near}"
    of_evaluation = policy.best if policy.best and not policy.best.is_late else None
    if of_evaluation and not job.evaluate:
        yield "checkpoint.best: needs scores; add evaluate, or remove checkpoint.best"
    elif of_evaluation and job.evaluate and policy.every % job.evaluate.every:  # a score must be of the very step
        yield (
            f"checkpoint.best: evaluate.every {job.evaluate.every} must divide checkpoint.every {policy.every}, "
            "so that each checkpoint is scored"
        )
    if policy.best and policy.best.metric == "train_loss":
        yield "checkpoint.best.metric: 'train_loss' is of the training data; name a score of the evaluation, as loss"
