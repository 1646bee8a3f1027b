"""Computes the bytes of training state on each worker, by ZeRO stage and offload. The functions are pure.

docs/plan-method.md has the formulas. Per parameter, mixed precision with Adam keeps 2 bytes of weights, 2 bytes of gradients, and
12 bytes of optimizer state: an fp32 master weight and two moments (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1). The
ZeRO stage decides which of these bytes the workers shard. Other optimizers keep fewer moments, or no moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from heliostat.optim.optimizers import STATE_BYTES
from heliostat.plan import zero_layout
from heliostat.plan.hardware import GIB

LOW = {"fp32": 4, "bf16": 2, "fp16": 2}
FRAGMENTATION = 0.08  # share of all allocated bytes that is in blocks that the allocator keeps but can't use
CONTEXT = 1.5 * GIB  # bytes that CUDA and NCCL use on a GPU
BUCKETS = {"reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 50_000_000,
           "stage3_param_persistence_threshold": 100_000, "stage3_max_live_parameters": 1_000_000_000}  # fmt: skip
# number of elements: DeepSpeed's defaults (deepspeed/runtime/zero/config.py)


@dataclass(frozen=True)
class StateBytes:
    """Holds the bytes of training state of one worker: on its device, and offloaded to its host or to NVMe.

    `masters` includes the averages of the weights that the job keeps.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    host: int
    disk: int
    summed: int = 0  # part of `gradients`: fp32 sums over micro-batches

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments


def partition(numel: int, workers: int) -> int:
    return -(-numel // workers)


def state(
    shapes: Mapping[str, tuple[int, ...]],
    frozen: frozenset[str],
    workers: int,
    stage: int,
    precision: str,
    offload_optimizer: bool = False,
    offload_param: str | None = None,
    persistence: int = BUCKETS["stage3_param_persistence_threshold"],
    accumulates: bool = True,
    averages: int = 0,
    sums_fp32: bool = True,
    moments: int | Mapping[str, int] = 2,
    copied: int | None = None,
) -> StateBytes:
    """Computes the bytes of training state that a worker has between two steps.

    The bytes of gradients are the maximum, just before the optimizer's step. The gradients of several micro-batches are summed in
    fp32 (`sums_fp32`), or in the job's precision. `moments`: number of optimizer-state tensors per parameter: one number for all
    parameters, or one for each parameter's name. `averages`: number of averages of the weights. `copied`: number of workers
    that shard a secondary copy of stage 3's weights.
    """
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    trained = sum(n for name, n in sizes.items() if name not in frozen)
    low = LOW[precision]
    counts = moments if isinstance(moments, Mapping) else dict.fromkeys(sizes, moments)
    apart = {k: {n: sizes[n] for n in sizes if n not in frozen and counts[n] == k} for k in sorted(set(counts.values()))}
    shares = {k: _share(of.values(), workers, stage) for k, of in apart.items()}
    share = _share((n for of in apart.values() for n in of.values()), workers, stage)
    kept = STATE_BYTES * sum(k * n for k, n in shares.items())
    if stage == 0:
        return StateBytes(
            weights=4 * sum(sizes.values()), gradients=4 * trained, masters=4 * trained * averages, moments=kept, host=0, disk=0
        )
    if stage == 3:
        small = sum(n for n in sizes.values() if n <= persistence)  # small parameters stay gathered
        again = sum(partition(n, min(copied, workers)) for n in sizes.values()) if copied else 0
        weights = low * (sum(partition(n, workers) for n in sizes.values()) + small + again)
    else:
        weights = low * sum(sizes.values())
    gradients, summed = low * (trained if stage == 1 else share), 0
    if accumulates and sums_fp32 and low < 4 and not (offload_optimizer and stage < 3):
        summed = 4 * (trained if stage == 1 else share)
        # stage 1 also keeps the gradients of the micro-batch, except in bf16 (`immediate_grad_update`)
        gradients = low * trained + summed if stage == 1 and precision != "bf16" else summed
    elif stage == 2 and accumulates:
        gradients = low * _touched({n: s for n, s in shapes.items() if n not in frozen}, workers)
    masters, host, disk = 4 * share * (1 + averages), 0, 0
    if offload_optimizer:  # the host also gets the gradients, in fp32
        host, masters, kept = masters + kept + 4 * share, 0, 0
        gradients, summed = (gradients, summed) if stage == 1 else (0, 0)
    if offload_param:
        moved = low * sum(partition(n, workers) for n in sizes.values())
        weights -= moved
        host, disk = (host + moved, 0) if offload_param == "cpu" else (host, moved)
    return StateBytes(weights, gradients, masters, kept, host, disk, summed)


def _share(sizes: Iterable[int], workers: int, stage: int) -> int:
    """Computes the number of elements whose fp32 master weights and moments one worker keeps."""
    return sum(partition(n, workers) for n in sizes) if stage == 3 else partition(sum(sizes), workers if stage else 1)


def _touched(shapes: Mapping[str, tuple[int, ...]], workers: int) -> int:
    """Counts, for each rank, the elements of all parameters of which the rank owns at least a part. Returns the largest count of
    all ranks.

    Stage 2 accumulates the complete gradients of these parameters.
    """
    owned = zero_layout.slices(shapes, 2, workers)
    return max(sum(math.prod(shapes[name]) for name, _, _ in rank) for rank in owned)


def working(parameters: int, largest_layer: int, stage: int, precision: str, config: Mapping[str, object], overlap: bool) -> int:
    """Computes the bytes of communication buffers. At stage 3, adds the bytes of parameters that are gathered at the same time.

    No buffer is larger than the model.
    """
    low, value = LOW[precision], {**BUCKETS, **{k: v for k, v in config.items() if k in BUCKETS and isinstance(v, int)}}
    if stage == 0:
        return 0
    reduce = min(value["reduce_bucket_size"], parameters) * (2 if overlap and stage < 3 else 1)
    if stage < 3:
        return low * (reduce + min(value["allgather_bucket_size"], parameters))
    live = max(largest_layer + value["stage3_prefetch_bucket_size"], value["stage3_max_live_parameters"])
    return low * (reduce + min(live, parameters))


@dataclass(frozen=True)
class Need:
    """Holds all bytes that a worker needs, by purpose: on its device and, with offload, on its host and disk."""

    weights: int
    gradients: int
    optimizer: int
    working: int
    activations: int
    frozen: int  # untrained models: their bytes in every step, or in evaluations the bytes that exceed the space of activations
    margin: int
    host: int
    disk: int
    summed: int  # part of `gradients`: fp32 sums over micro-batches

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.working + self.activations + self.frozen + self.margin

    def dump(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def need(
    state: StateBytes,
    working_bytes: int,
    activation_bytes: int,
    gpu: bool,
    frozen_models: tuple[int, int] = (0, 0),
    on_host: int = 0,
) -> Need:
    """Adds up the bytes that a worker needs: training state, buffers, activations, frozen models, and a margin.

    `frozen_models`: the bytes that frozen models need: first in every step, then in evaluations. Evaluations keep no activations.
    `on_host`: bytes of activations and pinned batches on the host.
    """
    always, evaluating = frozen_models
    frozen = max(always, evaluating - activation_bytes)
    taken = state.device + working_bytes + activation_bytes + frozen
    margin = int(FRAGMENTATION * taken + (CONTEXT if gpu else 0))
    return Need(
        state.weights, state.gradients, state.masters + state.moments, working_bytes, activation_bytes, frozen, margin,
        state.host + on_host, state.disk, state.summed,
    )  # fmt: skip


PURPOSES = ("weights", "gradients", "optimizer", "working", "activations", "frozen", "margin")


def parts(need: Mapping[str, int], digits: int = 1) -> str:
    """Formats a worker's device memory (`Need.dump`) in GiB by purpose. Also shows the GiB of fp32 sums of gradients."""
    sums = f" ({need['summed'] / GIB:.{digits}f} of them are sums in fp32)" if need["summed"] else ""
    shown = [name for name in PURPOSES if need[name] or name != "frozen"]
    return ", ".join(f"{name} {need[name] / GIB:.{digits}f}{sums * (name == 'gradients')}" for name in shown)
