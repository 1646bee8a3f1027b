"""Estimates how long a step takes, and what it moves: pure functions over operations, bytes and rates.

An operation takes the time of its arithmetic at the rate that its kind of work reaches on the device, and the time of its bytes
at the memory's rate; the rates are the peaks of the device times `efficiency` (prices.yaml), fitted to published runs or measured
by `heliostat plan --calibrate`. docs/plan-method.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from heliostat.plan.counts import ALWAYS, AT_STAGE_3, MATMUL, MEMORY, ModelStats, OperationWork
from heliostat.plan.hardware import Device, Network
from heliostat.plan.traffic import Traffic, rate

ITERATIONS = 5  # of Newton and Schulz, which orthogonalizes whole matrices (`heliostat.optim.whole_matrices`)
MOMENTUM = 4  # bytes of an element on its way: momenta travel in fp32
FP8 = "fp8"  # among a device's peaks
ROUNDING = 1  # times the bytes of a product: its factors are rounded to float8 first
BACKWARD = 2 / 3  # of a micro-batch's computing: what can hide a reduction of gradients


@dataclass(frozen=True)
class Setting:
    """Describes how a step is done by each worker. `replayed`: the share of the layers' forward pass that activation
    checkpointing computes again; `selective`: without its expensive operations."""

    workers: int
    stage: int
    micro_batch_size: float  # samples; of those that workers share, each counts for this worker's stretch
    accumulation: int
    replayed: float = 0.0
    compiled: bool = False
    selective: bool = False
    fp8: bool = False  # linear layers inside the model's layers multiply in float8

    def again(self, work: OperationWork) -> float:
        """Computes how often an operation is computed again."""
        plays = work.replayed == ALWAYS or (work.replayed == AT_STAGE_3 and self.stage == 3)
        return self.replayed if plays and not (self.selective and work.dear) else 0.0


def exchanging(elements: int, parts: int, low: int, setting: Setting, device: Device, network: Network) -> tuple[int, float]:
    """Estimates the bytes and seconds in which each worker of those that share samples hands parts to the others in a step.

    `elements`: that it sends in a forward pass over a sample; the backward pass sends as many, and so does a forward pass that is
    computed again. Nothing hides them: attention waits.
    """
    passes = 2 + setting.replayed
    moved = int(elements * low * passes * setting.micro_batch_size * parts * setting.accumulation)
    return moved, moved / (rate(parts, device) * network.rate)


def adding(
    added: tuple[float, float], sums: tuple[int, int], parts: int, low: int, setting: Setting, device: Device, network: Network
) -> tuple[int, float]:
    """Estimates the bytes and seconds in which each worker of those that divide matrices adds up products with the others.

    `added`: elements of a sample, in a forward pass and in a backward pass; `sums`: in how many all-reduces. A ring's all-reduce
    moves each element twice, and goes around twice. Nothing hides them. The result is of a step.
    """
    elements, calls = (forward * (1 + setting.replayed) + backward for forward, backward in (added, sums))
    moved = int(2 * elements * low * (parts - 1) / parts * setting.micro_batch_size * setting.accumulation)
    around = 2 * calls * setting.accumulation * hops(parts, device, network)
    return moved, moved / (rate(parts, device) * network.rate) + around


@dataclass(frozen=True)
class StepSeconds:
    """Holds the seconds of one optimizer step."""

    computing: float
    communicating: float
    exposed: float  # the part of it that computing does not hide
    updating: float  # the optimizer
    copying: float  # to and from the host, with offload

    @property
    def total(self) -> float:
        return self.computing + self.exposed + self.updating + self.copying


def operation(work: OperationWork, micro: float, device: Device, compiled: bool = False, fp8: bool = False) -> float:
    """Estimates the seconds of one operation on a micro-batch: its arithmetic and its bytes, and never less than a launch.

    `fp8`: a product that rounds its factors first.
    """
    efficiency, moved = device.efficiency, work.moved * micro + work.fixed
    traffic = moved / (device.bandwidth * efficiency.memory)
    if work.kind == MEMORY:
        return traffic * efficiency.fused if compiled else max(traffic, efficiency.launch)
    rate = device.flops * getattr(efficiency, work.kind)
    if fp8 and FP8 in device.peaks:
        rate = device.peaks[FP8] * efficiency.fp8
        traffic *= 1 + ROUNDING
    return max(work.flops * micro / rate + traffic, 0.0 if compiled else efficiency.launch)


def computing(work: Collection[OperationWork], setting: Setting, device: Device) -> float:
    """Estimates the seconds that a micro-batch computes. Products in float8 are those that equal one of the layers' forward pass,
    so not the head's."""
    inside = {(w.flops, w.fixed) for w in work if w.kind == MATMUL and w.replayed} if setting.fp8 else set()
    return sum(
        w.count
        * (1 + setting.again(w))
        * operation(w, setting.micro_batch_size, device, setting.compiled, w.kind == MATMUL and (w.flops, w.fixed) in inside)
        for w in work
    )


def divided(work: Iterable[OperationWork], stacks: Collection[int], parts: int) -> tuple[OperationWork, ...]:
    """Divides the bytes of experts' weights, of which each of so many workers reads its own.

    `stacks`: bytes of the weights of all experts of a layer, by which their products are found; the places of rows add a few.
    """

    def own(w: OperationWork) -> OperationWork:
        stacked = w.kind == MATMUL and any(math.isclose(w.fixed, size, rel_tol=1e-3) for size in stacks)
        return replace(w, fixed=w.fixed / parts) if stacked else w

    return tuple(map(own, work))


def updating(numel: float, moments: float, device: Device, on_host: bool = False) -> float:
    """Estimates the seconds in which an optimizer reads and writes masters, moments, gradients and weights of its share, in the
    device's memory, or in the worker's share of the host's."""
    efficiency = device.efficiency
    rate = device.host_bandwidth * efficiency.host if on_host else device.bandwidth * efficiency.memory
    return numel * (8 + 8 * moments + 4 + 2) / rate


def exposed(moved: Traffic, micro_s: float, setting: Setting, device: Device, network: Network) -> tuple[float, float]:
    """Estimates the seconds of communication of a step, and those that no computing hides.

    A ring passes from GPU to GPU inside a node, and from node to node through all of the node's network cards together. Stage 3
    gathers and reduces during all computing, stage 2 reduces during every backward pass, stages 0 and 1 during the last one.
    Nothing hides what is gathered after the optimizer's step, or averaged over groups before it.
    """
    if setting.workers == 1:
        return 0.0, 0.0
    seconds, after = (peak / network.rate for peak in moved.seconds(device))
    seconds += moved.calls * hops(moved.workers, device, network, moved.rings)
    if setting.stage == 3:
        overlapping, computing = seconds, micro_s * setting.accumulation
    else:
        passes = setting.accumulation if setting.stage == 2 else 1
        overlapping, computing = seconds * passes / (passes + 1), micro_s * BACKWARD * passes
    return seconds + after, seconds + after - min(overlapping * network.overlap, computing)


def hops(workers: int, device: Device, network: Network, rings: int = 1) -> float:
    """Estimates the seconds in which a message goes around a ring of all workers, or around each of so many rings of their parts,
    however small it is."""
    return (workers // rings - 1) * (network.hop_inside if workers <= device.per_node else network.hop)


def step(
    micro: float,
    moved: Traffic,
    updating: float,
    setting: Setting,
    device: Device,
    network: Network,
    copying: float = 0.0,
    exchanging: float = 0.0,
) -> StepSeconds:
    """Estimates the seconds of one optimizer step.

    `micro`: seconds that a micro-batch computes; `moved`: what each worker sends; `exchanging`: seconds in which those that
    share samples hand each other parts of them.
    """
    communicating, waits = exposed(moved, micro, setting, device, network)
    return StepSeconds(setting.accumulation * micro, communicating + exchanging, waits + exchanging, updating, copying)


def hidden_sides(model: ModelStats) -> Iterator[tuple[int, int]]:
    """Yields the sides of all hidden matrices; a stack of experts has one for each."""
    for name in model.hidden:
        *stacked, rows, columns = model.shapes[name]
        yield from ((rows, columns) for _ in range(math.prod(stacked)))


def momenta_sent(elements: int, workers: int, stage: int) -> int:
    """Estimates the bytes that each worker sends in a step: its slices to the workers that matrices fall to, and as many results
    back; 1 / workers of them stay where they are. At stage 0 all workers have whole matrices."""
    return 2 * MOMENTUM * elements * (workers - 1) // workers**2 if stage else 0


def newton_schulz(sides: Iterable[tuple[int, int]]) -> float:
    """Counts the FLOPs that orthogonalize matrices: in each iteration two products of a square with the matrix, and one of two
    squares of its shorter side."""
    return float(sum(ITERATIONS * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in sides))
