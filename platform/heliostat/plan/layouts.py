"""Lists the parallelism configurations of a job. Ranks those that fit in memory by their time per step (`heliostat plan JOB
--rank`).

A configuration (`Layout`) contains all settings that don't change what the model learns. These are the ZeRO stage, the
micro-batch size, activation checkpointing, offload, and the numbers of workers that share samples, matrices, or experts.
`ranking` makes the jobs that shard matrices and experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from heliostat import schema
from heliostat.config import rules
from heliostat.config.fields import divisors
from heliostat.config.spec import Job
from heliostat.recipes import adapters

GIB = 1 << 30
Checkpointing = bool | int | Literal["selective"]
CHECKPOINTING: list[Checkpointing] = [False, "selective", True]  # from simple to complex
OFFLOADS = {"none": (None, None), "optimizer": ("cpu", None), "optimizer, weights": ("cpu", "cpu")}  # (optimizer, param)


@dataclass(frozen=True)
class Layout:
    """Describes how a job trains on its workers.

    `checkpointing`: which layers use activation checkpointing: none, all, the first n, or all except their expensive operations
    ("selective"). `offload_param`: where stage 3 keeps its weights; None means on the device.
    """

    stage: int
    micro_batch_size: int
    checkpointing: Checkpointing
    offload_optimizer: bool
    offload_param: str | None = None
    sequence: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def family(self) -> tuple[object, ...]:
        """Returns the values that identify the configuration's family. Configurations of one family differ only in micro-batch
        size and number of checkpointed layers."""
        which = self.checkpointing if isinstance(self.checkpointing, bool | str) else "some"
        return self.stage, which, self.offload_optimizer, self.offload_param, *self.degrees

    @property
    def degrees(self) -> tuple[int, int, int]:
        return self.sequence, self.tensor, self.expert

    def settings(self) -> dict[str, object]:
        """Maps the job keys of this configuration, such as `train.zero.stage`, to their values."""
        return {
            "train.zero.stage": self.stage,
            "train.micro_batch_size": self.micro_batch_size,
            "train.activation_checkpointing": self.checkpointing,
            "train.zero.offload.optimizer": "cpu" if self.offload_optimizer else None,
            "train.zero.offload.param": self.offload_param,
            "train.parallel.sequence": self.sequence,
            "train.parallel.tensor": self.tensor,
            "train.parallel.expert": self.expert,
        }


@dataclass(frozen=True)
class Candidate:
    """Holds the estimates for a configuration: memory in bytes, seconds of a step by part, and the reason for its rank
    (`why`)."""

    layout: Layout
    fits: bool
    memory: dict[str, int]
    communication: dict[str, float]
    parts: dict[str, float]
    speed: dict[str, float]
    why: str = ""

    def dump(self) -> dict[str, object]:
        layout, estimates = self.layout, {k: v for k, v in vars(self).items() if k != "layout"}
        return {
            "layout": layout.settings(), "stage": layout.stage, "micro_batch_size": layout.micro_batch_size,
            "parallel": {"sequence": layout.sequence, "tensor": layout.tensor, "expert": layout.expert},
            "activation_checkpointing": layout.checkpointing, "offload_optimizer": layout.offload_optimizer, **estimates,
        }  # fmt: skip


def of(job: Job) -> Layout:
    """Returns the configuration of a job."""
    train, zero = job.train, job.train.zero
    param = zero.offload.param if zero.stage == 3 else None
    offload, degrees = bool(zero.offload.optimizer), (train.parallel.sequence, train.parallel.tensor, train.parallel.expert)
    return Layout(zero.stage, train.micro_batch_size, train.activation_checkpointing, offload, param, *degrees)


def changes(job: Job, layout: Layout) -> list[str]:
    """Lists the `--set` values that change a job to a configuration. Leaves out keys that stay the same."""
    was, train = of(job).settings(), job.train
    changed = [f"{key}={_yaml(value)}" for key, value in layout.settings().items() if _yaml(value) != _yaml(was[key])]
    if train.zero.offload.nvme_path and layout.offload_param != "nvme":
        changed.append("train.zero.offload.nvme_path=null")
    if train.parallel.auto:  # the value `auto` has no subkeys
        names = zip(("sequence", "tensor", "expert"), layout.degrees, strict=True)
        whole = ", ".join(f"{name}: {n}" for name, n in names if n > 1)
        changed = [f"train.parallel={{{whole}}}", *(one for one in changed if not one.startswith("train.parallel."))]
    return changed


def applied(job: Job, layout: Layout) -> Job:
    """Copies a job with another parallelism configuration. Raises ConfigError if the job doesn't support this configuration."""
    return schema.validate(Job, schema.apply(job.dump(), changes(job, layout)), job.name)


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()


def candidates(job: Job, workers: int, degrees: Iterable[int] = (1,), selects: bool = False) -> Iterator[Layout]:
    """Yields every configuration that the job could have on `workers` workers, with the job's own tensor and expert parallelism.
    `degrees`: numbers of workers that may share a sample. `selects`: whether activation checkpointing can cover only some of the
    layers."""
    parallel = job.train.parallel
    for sequence in degrees:
        for layout in _alone(job, workers // (sequence * parallel.tensor), selects):
            yield replace(layout, sequence=sequence, tensor=parallel.tensor, expert=parallel.expert)


def _alone(job: Job, replicas: int, selects: bool) -> Iterator[Layout]:
    kinds: list[Checkpointing] = [False, True] if not selects or any(rules.untried_selective(job).values()) else CHECKPOINTING
    if job.train.activation_offload:
        kinds = [True]
    micros = divisors(job.train.global_batch_size // replicas)
    zero, parallel = job.train.zero, job.train.parallel
    apart = parallel.expert > 1 or bool(
        zero.shard_group_size or zero.hpz_partition_size or zero.quantize_weights
    )  # these need stage 3
    least = 3 if apart else 0 if job.train.precision == "fp32" else 1  # stage 0 supports only fp32
    divides = apart or parallel.tensor > 1  # neither supports offload
    most = 2 if parallel.tensor > 1 or adapters.in_4_bits(job.model) else 3
    for stage in range(least, most + 1):
        for optimizer, param in OFFLOADS.values() if job.workers.gpus and not divides else [(None, None)]:
            if (optimizer and not stage) or (param and stage < 3):
                continue
            for checkpointing in kinds:
                for micro in micros:
                    yield Layout(stage, micro, checkpointing, bool(optimizer), param)


def order(candidate: Candidate) -> tuple[object, ...]:
    """Returns a sort key of candidates. Candidates that fit in memory come first, sorted by time per step. The others are sorted
    by memory. Simplicity breaks ties."""
    if not candidate.fits:
        return (1, candidate.memory["total"], *complexity(candidate.layout))
    return (0, round(candidate.speed["step_s"], 3), *complexity(candidate.layout))


def complexity(layout: Layout) -> tuple[object, ...]:
    """Returns a sort key of configurations. Simple configurations come first: no offload, no groups of workers, a low stage,
    few checkpointed layers, a large micro-batch."""
    offload = layout.offload_optimizer, layout.offload_param or ""
    which = layout.checkpointing
    kind = (CHECKPOINTING.index(which), 0) if isinstance(which, bool | str) else (len(CHECKPOINTING), which)
    return (*offload, math.prod(layout.degrees), layout.stage, kind, -layout.micro_batch_size)


def ranked(estimates: list[Candidate], possible: Callable[[Layout], bool] = lambda _: True) -> list[Candidate]:
    """Ranks the candidates for which `possible` is true, and gives each candidate the reason for its rank. Only the best
    candidate of each family (`Layout.family`) stays."""
    best: dict[tuple[object, ...], Candidate] = {}
    for one in sorted(estimates, key=order):
        if one.layout.family not in best and possible(one.layout):
            best[one.layout.family] = one
    first = next(iter(best.values()), None)
    return [replace(one, why=why(one, first)) for one in best.values()] if first else []


def why(one: Candidate, first: Candidate) -> str:
    """Explains the rank of a candidate: names the memory that doesn't fit, or the part of a step that needs the most additional
    time compared with the first candidate."""
    if not one.fits:
        return _lacks(one.memory)
    if one is first:
        return "the fastest that fits"
    more = {part: one.parts[part] - first.parts[part] for part in first.parts}
    slower = one.speed["step_s"] - first.speed["step_s"]
    part = max(more, key=lambda p: more[p])
    if slower < 1e-3 or more[part] <= 0:
        if complexity(one.layout) < complexity(first.layout):
            return f"{1000 * slower:.1f} ms slower than the first, but simpler"
        return "as fast as the first, but more complex"
    return f"+{more[part]:.2f} s {PARTS[part]}"


PARTS = {
    "forward_backward": "for smaller operations",
    "replaying": "for the recomputed forward pass",
    "updating": "for the optimizer's update",
    "exposed": "for communication that doesn't overlap",
    "copying": "for copies to and from the host",
}


def _lacks(memory: dict[str, int]) -> str:
    if memory["total"] > memory["device"]:
        largest = max(("weights", "gradients", "optimizer", "working", "activations", "frozen"), key=lambda k: memory[k])
        sums = f" ({memory['summed'] / GIB:.1f} of them are sums in fp32)" if largest == "gradients" and memory["summed"] else ""
        return f"{(memory['total'] - memory['device']) / GIB:.1f} GiB too much, {largest} {memory[largest] / GIB:.1f}{sums}"
    return f"{memory['host'] / GIB:.1f} GiB of host memory per worker, more than a worker's share"
