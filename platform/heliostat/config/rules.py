"""Checks rules between the sections of a job. Batch sizes must be divisible, and the combination of settings (precision, ZeRO
stage, offload, hardware) must be supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from heliostat.config.fields import divisors
from heliostat.config.sections import Checkpoint, Data, Evaluate, Mlflow, Workers
from heliostat.config.train_section import SELECTIVE, Train
from heliostat.redact import carries_secret


class Ruled(Protocol):
    """Describes the parts of a job (`spec.Job`) that the rules read."""

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
    """Lists the broken rules, one line each. A line begins with the key."""
    # only the first broken rule counts, because later rules assume that earlier rules hold
    groups = (_sequence_faults, _expert_faults, _tensor_faults, _many_nodes_faults, _batch_faults)
    others = (_memory_faults, _precision_faults, _offload_faults, _checkpoint_faults, _attention_faults, _fp8_faults,
              _optimizer_faults, _mix_faults, _mlflow_faults, _step_faults)  # fmt: skip
    first = next((lines for rule in groups if (lines := list(rule(job)))), [])
    return first + [line for rule in others for line in rule(job)]


def _step_faults(job: Ruled) -> Iterator[str]:
    paths, schedule = [s.path for s in job.data.sources], job.train.schedule
    if len(set(paths)) < len(paths):
        yield "data.sources: a path is listed twice. List this path once, with the sum of its weights"
    if schedule.warmup_steps >= job.train.steps:
        yield (
            f"train.schedule.warmup_steps: {schedule.warmup_steps} isn't below train.steps {job.train.steps}. Lower warmup_steps"
        )


def _sequence_faults(job: Ruled) -> Iterator[str]:
    each, train = job.train.parallel.sequence, job.train
    if each == 1:
        return
    key = f"train.parallel.sequence: {each}"
    yield from _group_faults(key, each, job)
    length = job.data.sequence_length  # unset if samples are rows; the recipe then checks its own length
    if length and length % each:
        near = " or ".join(map(str, _multiples(length, each)))
        yield f"{key} doesn't divide data.sequence_length {length}. Use a length of {near}"
    if train.compile:
        yield f"{key} isn't supported with train.compile. Set train.compile to false"
    if train.sdc_check:
        yield f"{key} isn't supported with train.sdc_check, which compares complete samples. Remove train.sdc_check"


def _group_faults(key: str, each: int, job: Ruled) -> list[str]:
    """Lists the reasons why the workers can't form groups of `each` workers."""
    workers = job.workers
    if isinstance(workers.count, int) and workers.count % each:
        near = " or ".join(map(str, _multiples(workers.count, each)))
        return [f"{key} doesn't divide workers.count {workers.count}. Use {near} workers"]
    if workers.most // each * each < workers.least:
        return [
            f"{key}: no number from {workers.least} to {workers.most} (workers.count) is a multiple of this number. "
            "Change one of the two keys"
        ]
    return []


def _multiples(number: int, of: int) -> list[int]:
    """Lists the multiples of `of` that are nearest to a number: the multiple at or below the number (unless it is 0), and the
    next one."""
    return [n for n in (number // of * of, (number // of + 1) * of) if n]


def _untried(key: str, others: Mapping[str, object]) -> list[str]:
    """Lists the conflicts of a key with other settings. `others`: name of a setting -> whether the job has it."""
    return [f"{key} isn't supported with {other}. Remove one of them" for other, is_set in others.items() if is_set]


def _expert_faults(job: Ruled) -> Iterator[str]:
    each, train = job.train.parallel.expert, job.train
    if each == 1:
        return
    key = f"train.parallel.expert: {each}"
    yield from _group_faults(key, each, job)
    if train.zero.stage != 3:
        yield f"{key} needs train.zero.stage 3, which shards the other weights. Set train.zero.stage to 3"
    yield from _untried(key, _unshared(train))


def _tensor_faults(job: Ruled) -> Iterator[str]:
    each, train = job.train.parallel.tensor, job.train
    if each == 1:
        return
    key = f"train.parallel.tensor: {each}"
    yield from _group_faults(key, each, job)
    if train.zero.stage == 3:
        yield f"{key} isn't supported with train.zero.stage 3, which shards every matrix over all workers. Use stage 1 or 2"
    own = {
        "train.parallel.expert": train.parallel.expert > 1,
        "train.tiled_mlp": train.tiled_mlp,
        "train.precision: fp16": train.precision == "fp16",
    }
    yield from _untried(key, own | _unshared(train))


def _unshared(train: Train) -> dict[str, object]:
    """Lists the settings that aren't supported if workers share experts or matrices: setting -> whether the job has it."""
    return {
        "train.parallel.sequence": train.parallel.sequence > 1,
        "train.compile": train.compile,
        "train.sdc_check": train.sdc_check,
        "train.zero.offload": train.zero.offload.optimizer or train.zero.offload.param,
        f"train.optimizer.name: {train.optimizer.name}": train.optimizer.orthogonalizes,
    }


def _many_nodes_faults(job: Ruled) -> Iterator[str]:
    """Lists the broken rules of the settings that reduce traffic between nodes."""
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
            yield f"{key} shards weights, so it needs train.zero.stage 3, not {zero.stage}. Set train.zero.stage to 3"
        if not isinstance(each, bool):
            yield from _group_faults(key, each, job)
        yield from _untried(key, untried)
    if zero.shard_group_size and zero.hpz_partition_size:
        yield (
            "train.zero.hpz_partition_size: no effect with train.zero.shard_group_size, which keeps all weights "
            "within a group. Remove hpz_partition_size"
        )
    if zero.shard_group_size and zero.offload.optimizer:
        yield "train.zero.shard_group_size: not supported with train.zero.offload.optimizer. Remove one of them"
    if zero.shard_group_size and train.optimizer.orthogonalizes:
        yield (
            f"train.zero.shard_group_size: not supported with train.optimizer.name {train.optimizer.name!r}. "
            "Remove shard_group_size"
        )
    if zero.quantize_weights and not job.workers.gpus:
        yield "train.zero.quantize_weights: true needs GPUs (workers.gpus is 0). Set quantize_weights to false"
    if zero.quantize_weights and zero.shard_group_size:
        yield "train.zero.quantize_weights: not supported with train.zero.shard_group_size. Remove one of them"


def _memory_faults(job: Ruled) -> Iterator[str]:
    """Lists the broken rules of the settings that save memory."""
    train = job.train
    options = {"tiled_loss": train.tiled_loss, "tiled_mlp": train.tiled_mlp, "activation_offload": train.activation_offload}
    for key, on in options.items():
        if on and train.compile:
            yield f"train.{key}: true isn't supported with train.compile. Set one of them to false"
    if train.activation_checkpointing == SELECTIVE:
        yield from _untried(f"train.activation_checkpointing: {SELECTIVE}", untried_selective(job))
    if train.activation_offload and not train.activation_checkpointing:
        yield (
            "train.activation_offload: needs train.activation_checkpointing, because only inputs of checkpointed layers are "
            "offloaded. Set both keys"
        )


def untried_selective(job: Ruled) -> dict[str, bool]:
    """Lists the settings that aren't supported with selective checkpointing: setting -> whether the job has it."""
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
        near = f"Use a global batch of {' or '.join(map(str, _multiples(batch, count * micro)))}"
        workers = f", or workers.count {each * min(fits, key=lambda n: abs(n - count))}" if fits else ""
        return [f"train.global_batch_size: {batch} isn't divisible by {named} x train.micro_batch_size {micro}. {near}{workers}"]
    if batch % job.virtual_ranks or job.virtual_ranks % count:
        fits = [count * d for d in divisors(batch // count)]
        return [
            (
                f"data.virtual_ranks: {job.virtual_ranks} doesn't divide train.global_batch_size {batch}, or isn't a "
                f"multiple of {named}. Use {min(fits, key=lambda c: abs(c - job.virtual_ranks))}"
            )
        ]
    return []


def _elastic_faults(job: Ruled) -> list[str]:
    batch, ranks, workers = job.train.global_batch_size, job.virtual_ranks, job.workers
    if batch % ranks:
        near = min(divisors(batch), key=lambda c: abs(c - ranks))
        return [f"data.virtual_ranks: {ranks} doesn't divide train.global_batch_size {batch}. Use {near}"]
    if job.worker_counts():
        return []
    most = ranks * job.train.parallel.sharing
    nearest = min(job.train.worker_counts(ranks, 1, most), key=lambda n: abs(n - workers.least), default=None)
    fix = f"Use {nearest}" if nearest else "Use a train.micro_batch_size that divides train.global_batch_size"
    return [
        f"workers.count: no number from {workers.least} to {workers.most} divides the {ranks} virtual ranks into complete "
        f"micro-batches. {fix}"
    ]


def _mix_faults(job: Ruled) -> Iterator[str]:
    data, before = job.data, 0
    for i, change in enumerate(data.mix_schedule):
        key = f"data.mix_schedule.{i}"
        if len(change.weights) != len(data.sources):
            problem = f"expected one weight for each of the {len(data.sources)} sources, got {len(change.weights)}"
            yield f"{key}.weights: {problem}. List one weight per source"
        if change.step <= before:
            yield f"{key}.step: {change.step} isn't above {before}. List the changes in the order of their steps"
        before = change.step
    mixes = [[s.weight for s in data.sources], *(c.weights for c in data.mix_schedule)]
    empty = [i for i, weights in enumerate(mixes) if not any(weights)]
    for i in empty:
        yield f"{f'data.mix_schedule.{i - 1}.weights' if i else 'data.sources'}: all weights are 0. Set one weight above 0"
    for i in range(len(data.sources)):
        if not empty and not any(weights[i] for weights in mixes if i < len(weights)):
            yield f"data.sources.{i}.weight: is 0 at every step. Remove this source, or set a weight above 0"


def _precision_faults(job: Ruled) -> Iterator[str]:
    if job.train.precision == "fp16" and not job.workers.gpus:
        yield "train.precision: 'fp16' needs GPUs (workers.gpus is 0). Use bf16 or fp32"
    if job.train.compile == "blocks" and job.train.zero.stage == 3:
        yield (
            "train.compile: blocks isn't supported with train.zero.stage 3, which gathers weights inside each "
            "layer. Use stage 2, or set train.compile to true or false"
        )
    if job.train.precision == "bf16" and job.train.zero.stage == 0:
        yield "train.zero.stage: 0 with train.precision 'bf16' trains wrongly in DeepSpeed. Use stage 1, or train.precision fp32"
    if job.train.precision == "fp16" and job.train.zero.stage == 0:
        yield "train.zero.stage: 0 with train.precision 'fp16' has no master weights for checkpoints. Use stage 1"
    if job.train.grad_accum_dtype == "fp32" and sums_on_host(job):
        where = f"train.zero.offload.optimizer at train.zero.stage {job.train.zero.stage}"
        yield (
            f"train.grad_accum_dtype: fp32 isn't supported with {where}: DeepSpeed sums in host memory in low "
            "precision. Use train.zero.stage 3, or set train.grad_accum_dtype to same"
        )


def _attention_faults(job: Ruled) -> Iterator[str]:
    train, name = job.train, job.train.attention
    if name is None or name in ("sdpa", "eager"):
        return
    key = f"train.attention: {name!r}"
    if not job.workers.gpus:
        yield f"{key} needs GPUs (workers.gpus is 0). Use sdpa, which gives the same results"
    if train.parallel.sequence > 1:
        yield f"{key} isn't supported with train.parallel.sequence. Use sdpa"
    if name.startswith("flash"):
        if train.precision == "fp32":
            yield f"{key} supports only bf16 and fp16. Set train.precision, or use sdpa"
        if job.data.document_mask and train.micro_batch_size > 1:
            yield (
                f"{key} with data.document_mask needs micro-batches of one sample, and train.micro_batch_size is "
                f"{train.micro_batch_size}. Set the micro-batch size to 1 (with longer samples), or use flex_attention"
            )


def _fp8_faults(job: Ruled) -> list[str]:
    train = job.train
    if not train.fp8:
        return []
    wrong = {
        "needs GPUs (workers.gpus is 0)": not job.workers.gpus,
        f"isn't supported with train.precision {train.precision!r}: the rest of the model must be bf16": train.precision
        != "bf16",
        "isn't supported with train.parallel": train.parallel.sharing > 1 or train.parallel.expert > 1,
        "isn't supported with train.tiled_mlp": train.tiled_mlp,
    }
    return [f"train.fp8: true {why}. Set train.fp8 to false, or change the other key" for why, is_so in wrong.items() if is_so]


def _optimizer_faults(job: Ruled) -> Iterator[str]:
    optimizer = job.train.optimizer
    if optimizer.averages and job.train.schedule.name != "constant":
        name = job.train.schedule.name
        yield (
            f"train.schedule.name: {name!r} isn't supported with optimizer {optimizer.name!r}, whose average of the "
            "weights replaces a schedule. Use constant"
        )
    if optimizer.averages and job.train.ema:
        yield f"train.ema: optimizer {optimizer.name!r} keeps an average of the weights itself. Remove train.ema"
    if optimizer.orthogonalizes and job.train.zero.offload.param == "nvme":
        yield f"train.zero.offload.param: nvme isn't supported with optimizer {optimizer.name!r}. Use cpu"


def sums_on_host(job: Ruled) -> bool:
    return bool(job.train.zero.offload.optimizer) and job.train.zero.stage in (1, 2) and job.train.precision != "fp32"


def _offload_faults(job: Ruled) -> Iterator[str]:
    zero, offload = job.train.zero, job.train.zero.offload
    if offload.optimizer and zero.stage == 0:
        yield "train.zero.offload.optimizer: needs train.zero.stage 1, 2, or 3. Set train.zero.stage"
    if offload.param and zero.stage != 3:
        yield f"train.zero.offload.param: needs train.zero.stage 3, not {zero.stage}. Set train.zero.stage to 3"
    if (offload.param == "nvme") != bool(offload.nvme_path):
        yield (
            "train.zero.offload.nvme_path: needed with train.zero.offload.param 'nvme', and only with 'nvme'. "
            "Set both keys, or neither"
        )


def _mlflow_faults(job: Ruled) -> Iterator[str]:
    mlflow = job.mlflow
    if carries_secret(mlflow.uri):
        yield (
            "mlflow.uri: must not contain a password. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN (for PostgreSQL: PGPASSWORD; for MySQL: ?read_default_file=FILE)"
        )
    if mlflow.alias and not mlflow.register_as:
        yield f"mlflow.alias: {mlflow.alias!r} needs a registered model. Set mlflow.register too"


def _checkpoint_faults(job: Ruled) -> Iterator[str]:
    policy = job.checkpoint
    benchmarks = job.evaluate.benchmarks if job.evaluate else None
    rare = {
        "checkpoint.keep_every": policy.keep_every,
        "evaluate.benchmarks.every": benchmarks.every if benchmarks else None,
        "train.ema.every": job.train.ema.every if job.train.ema else None,
    }
    for key, every in rare.items():
        if every and every % policy.every:
            near = policy.every * max(1, round(every / policy.every))
            yield f"{key}: {every} isn't a multiple of checkpoint.every {policy.every}. Use {near}"
    of_evaluation = policy.best if policy.best and not policy.best.is_late else None
    if of_evaluation and not job.evaluate:
        yield "checkpoint.best: needs scores. Add the section evaluate, or remove checkpoint.best"
    elif of_evaluation and job.evaluate and policy.every % job.evaluate.every:  # a checkpoint needs a score of the same step
        yield (
            f"checkpoint.best: evaluate.every {job.evaluate.every} doesn't divide checkpoint.every {policy.every}, "
            "so some checkpoints would have no score. Change one of the two keys"
        )
    if policy.best and policy.best.metric == "train_loss":
        yield "checkpoint.best.metric: 'train_loss' is a score of the training. Use a score of the evaluation, for example loss"
