"""Estimates a training step's time and the bytes that the step moves. The functions are pure: they compute with operations,
bytes, and rates.

The time of an operation is the time of its arithmetic plus the time of its bytes. Arithmetic runs at the rate that its kind of
work reaches on the device, and bytes move at the memory's rate. A rate is the device's peak times `efficiency` (prices.yaml). The
efficiencies are fitted to published runs, or measured by `heliostat plan --calibrate`. docs/plan-method.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from heliostat.optim.matrix_shapes import sides
from heliostat.plan.counts import ALWAYS, AT_STAGE_3, MATMUL, MEMORY, ModelStats, OperationWork
from heliostat.plan.hardware import Device, Network
from heliostat.plan.traffic import Traffic, rate

ITERATIONS = 5  # iterations of Newton-Schulz, which orthogonalizes matrices (`heliostat.optim.whole_matrices`)
MOMENTUM = 4  # bytes per sent element: momenta travel in fp32
FP8 = "fp8"  # a key of `Device.peaks`
ROUNDING = 1  # additional traffic per byte of a matrix multiplication, whose inputs are first rounded to float8
BACKWARD = 2 / 3  # share of a micro-batch's computing that can hide reductions of gradients


@dataclass(frozen=True)
class Setting:
    """Describes how each worker computes a step. `replayed`: the share of the layers' forward pass that activation
    checkpointing recomputes. `selective`: whether activation checkpointing doesn't recompute expensive operations."""

    workers: int
    stage: int
    micro_batch_size: float  # in samples; if workers share a sample, only this worker's part counts
    accumulation: int
    replayed: float = 0.0
    compiled: bool = False
    selective: bool = False
    fp8: bool = False  # whether linear layers inside the model's layers multiply in float8

    def again(self, work: OperationWork) -> float:
        """Returns the share of an operation's calls that activation checkpointing recomputes, between 0 and 1."""
        recomputed = work.replayed == ALWAYS or (work.replayed == AT_STAGE_3 and self.stage == 3)
        return self.replayed if recomputed and not (self.selective and work.dear) else 0.0


def exchanging(elements: int, parts: int, low: int, setting: Setting, device: Device, network: Network) -> tuple[int, float]:
    """Estimates the bytes that a worker sends in a step to the other workers that share its samples, and the seconds for
    sending them.

    `elements`: number of elements that a worker sends in the forward pass of one sample. The backward pass sends the same number,
    and so does a recomputed forward pass. No computing overlaps with this time, because attention waits for the elements.
    """
    passes = 2 + setting.replayed
    moved = int(elements * low * passes * setting.micro_batch_size * parts * setting.accumulation)
    return moved, moved / (rate(parts, device) * network.rate)


def adding(
    added: tuple[float, float], sums: tuple[int, int], parts: int, low: int, setting: Setting, device: Device, network: Network
) -> tuple[int, float]:
    """Estimates the bytes that a tensor-parallel worker sends in the all-reduces of a step, and the seconds for sending them.

    `added`: elements per sample, in a forward pass and in a backward pass. `sums`: number of all-reduces in each pass. An
    all-reduce in a ring moves each element twice, and goes around the ring twice. No computing overlaps with this time.
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
    exposed: float  # the part of `communicating` that computing doesn't hide
    updating: float  # the optimizer's update
    copying: float  # copies to and from the host, with offload

    @property
    def total(self) -> float:
        return self.computing + self.exposed + self.updating + self.copying


def operation(work: OperationWork, micro: float, device: Device, compiled: bool = False, fp8: bool = False) -> float:
    """Estimates the seconds of one operation on a micro-batch, from its arithmetic and its bytes. The minimum is the time of a
    kernel launch.

    `fp8`: whether the operation is a matrix multiplication that first rounds its inputs to float8.
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
    """Estimates the computing seconds of a micro-batch. With `fp8`, the matrix multiplications in the layers run in float8, but
    not the matrix multiplications in the head. A matrix multiplication belongs to a layer if the layers' forward pass has a
    matrix multiplication of equal work."""
    inside = {(w.flops, w.fixed) for w in work if w.kind == MATMUL and w.replayed} if setting.fp8 else set()
    return sum(
        w.count
        * (1 + setting.again(w))
        * operation(w, setting.micro_batch_size, device, setting.compiled, w.kind == MATMUL and (w.flops, w.fixed) in inside)
        for w in work
    )


def divided(work: Iterable[OperationWork], stacks: Collection[int], parts: int) -> tuple[OperationWork, ...]:
    """Divides the bytes of experts' weights by the number of workers, because each worker reads only its own experts.

    `stacks`: bytes of the weights of all experts of a layer. These bytes identify the experts' matrix multiplications. The bytes
    of such a multiplication are slightly larger, because these bytes include the positions of rows.
    """

    def own(w: OperationWork) -> OperationWork:
        stacked = w.kind == MATMUL and any(math.isclose(w.fixed, size, rel_tol=1e-3) for size in stacks)
        return replace(w, fixed=w.fixed / parts) if stacked else w

    return tuple(map(own, work))


def updating(numel: float, moments: float, device: Device, on_host: bool = False) -> float:
    """Estimates the seconds in which a worker's optimizer step reads and writes this worker's share of master weights, moments,
    gradients, and weights. This data is in the device's memory, or in the worker's share of host memory (`on_host`)."""
    efficiency = device.efficiency
    rate = device.host_bandwidth * efficiency.host if on_host else device.bandwidth * efficiency.memory
    return numel * (8 + 8 * moments + 4 + 2) / rate


def exposed(moved: Traffic, micro_s: float, setting: Setting, device: Device, network: Network) -> tuple[float, float]:
    """Estimates the seconds of communication in a step, and the seconds that don't overlap with computing.

    A ring goes from GPU to GPU inside a node, and from node to node through all network cards of a node together. Stage 3 gathers
    and reduces during all computing. Stage 2 reduces during every backward pass, stages 0 and 1 only during the last backward
    pass. No computing overlaps with gathers after the optimizer's step, or with averages over groups before that step.
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
    """Estimates the minimum seconds (latency) for a message to go around a ring of all workers. `rings`: number of smaller rings
    instead of one ring."""
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

    `micro`: computing seconds of a micro-batch. `moved`: bytes that each worker sends. `exchanging`: seconds of all other
    exchanges between workers, which don't overlap with computing.
    """
    communicating, waits = exposed(moved, micro, setting, device, network)
    return StepSeconds(setting.accumulation * micro, communicating + exchanging, waits + exchanging, updating, copying)


def hidden_sides(model: ModelStats) -> Iterator[tuple[int, int]]:
    """Yields (rows, columns) of all hidden matrices. A parameter can contain several matrices (`matrix_shapes.sides`)."""
    for name in model.hidden:
        count, rows, columns = sides(model.shapes[name])
        yield from ((rows, columns) for _ in range(count))


def momenta_sent(elements: int, workers: int, stage: int) -> int:
    """Estimates the bytes that each worker sends in a step for Muon. A worker sends slices to the workers that orthogonalize the
    matrices. It also sends the same number of bytes of results to the owners of the slices. The share 1 / workers of these bytes
    stays local. At stage 0, all workers have complete matrices, and send nothing."""
    return 2 * MOMENTUM * elements * (workers - 1) // workers**2 if stage else 0


def newton_schulz(sides: Iterable[tuple[int, int]]) -> float:
    """Counts the FLOPs for orthogonalizing matrices. Each iteration has three matrix multiplications: two of a square matrix with
    the matrix, and one of two square matrices. A side of the square matrix is as long as the shorter side of the matrix to
    orthogonalize."""
    return float(sum(ITERATIONS * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in sides))
