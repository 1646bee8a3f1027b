"""Estimates memory, speed, and cost of a job on a device, in any parallelism configuration, and the best checkpoint interval.

Let mu be the mean time between interruptions, C the time that a save stops training, and R the time of a restart. The interval W
that wastes the least time is sqrt(2 C mu) (Young 1974, doi 10.1145/361147.361115). Daly 2006, doi 10.1016/j.future.2004.11.016,
adds terms that vanish for C << mu. Saving wastes the share C / W of the time. Recomputing and restarting waste the share (W / 2 +
R) / mu.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from heliostat.config import spec
from heliostat.config.spec import Job
from heliostat.config.train_section import SELECTIVE
from heliostat.engine.engine_config import engine_config
from heliostat.optim.optimizers import STATE_BYTES, Muon
from heliostat.plan import hardware, layouts, memory, step_time, traffic
from heliostat.plan.counts import Counts
from heliostat.plan.hardware import Device, Prices
from heliostat.plan.layouts import Candidate, Layout
from heliostat.plan.traffic import Traffic

HOUR = 3600.0
BATCHES = 2  # steps whose batches are in pinned memory: the current step and the next step


class Planner:
    """Estimates memory and speed of a job on a device, in its own parallelism configuration and in others."""

    def __init__(
        self,
        job: Job,
        counts: Counts,
        device: Device,
        prices: Prices,
        exchanged: Mapping[int, int] | None = None,
        selects: bool = False,
    ) -> None:
        """Prepares the estimates. `exchanged` maps the number of workers that share a sample to the number of elements that each
        of them sends in the sample's forward pass. `selects`: whether activation checkpointing can cover only some of the
        layers."""
        self.job, self.device, self.prices, self.exchanged = job, device, prices, exchanged or {1: 0}
        self.model, self.kept, self.work = counts.model, counts.kept, counts.work
        self.workers, self.gpu = job.workers.most, device.name != "cpu"
        self.tensor = job.train.parallel.tensor
        self.replicas = self.workers // self.tensor  # workers with the same shard of each matrix; they shard the state
        self.shapes = counts.model.own(self.tensor)  # shapes of one worker's parameters
        if (parts := job.train.parallel.expert) > 1:
            stacks = {memory.LOW[job.train.precision] * math.prod(counts.model.shapes[n]) for n in counts.model.stacked}
            self.work = step_time.divided(counts.work, stacks, parts)
        self.network, self.selects = hardware.network(prices), selects
        self._micro: dict[tuple[int, int, bool, bool, int], tuple[float, float]] = {}

    def chosen(self) -> Candidate:
        """Estimates the job in its own configuration."""
        return self.candidate(layouts.of(self.job))

    def recommend(self) -> Candidate | None:
        """Finds the fastest configuration that fits in memory. Returns None if no configuration fits."""
        whole = layouts.candidates(self.job, self.workers, [self.job.train.parallel.sequence], self.selects)
        best = min((self.candidate(one) for layout in whole for one in (layout, *self.partly(layout))), key=layouts.order)
        return best if best.fits else None

    def partly(self, layout: Layout) -> Iterator[Layout]:
        """Yields, for a configuration that checkpoints all layers, the variant that fits with the fewest checkpointed layers.
        Yields nothing if the configuration fits without checkpointed layers, or only if all layers are checkpointed."""
        many = len(self.kept.layers)
        if not self.selects or layout.checkpointing is not True or many < 2 or self._fits(layout, 0):
            return
        fewest = 1 + bisect.bisect_left(range(1, many), True, key=lambda n: self._fits(layout, n))
        if fewest < many:
            yield replace(layout, checkpointing=fewest)

    def _fits(self, layout: Layout, checkpointed: int) -> bool:
        few = replace(layout, checkpointing=checkpointed)
        _, need, _ = self._memory(few, self._accumulation(few))
        return self._within(need)

    def _within(self, need: memory.Need) -> bool:
        return need.total <= self.device.memory and need.host <= self.device.host_memory

    def _accumulation(self, layout: Layout) -> int:
        return self.job.train.global_batch_size * layout.sequence // (self.replicas * layout.micro_batch_size)

    def _checkpointed(self, layout: Layout) -> int:
        """Counts the layers whose activations are recomputed in a configuration."""
        many, which = len(self.kept.layers), layout.checkpointing
        return many if which is True or isinstance(which, str) else min(many, which)

    def candidate(self, layout: Layout) -> Candidate:
        """Estimates memory, communication, and speed of the job in a configuration. All other settings stay as in the job."""
        accumulation = self._accumulation(layout)
        state, need, left = self._memory(layout, accumulation)
        moved = self._traffic(layout, accumulation)
        took, replaying, handed = self._time(layout, accumulation, moved, state.host + state.disk + left * accumulation)
        per_second = self.job.train.global_batch_size / took.total
        return Candidate(
            layout=layout,
            fits=self._within(need),
            memory={**need.dump(), "device": int(self.device.memory)},
            communication={
                "bytes_per_step": moved.total + handed,
                "between_nodes": moved.between_nodes(self.device.per_node),
                "seconds_per_step": took.communicating,
                "exposed_s": took.exposed,
            },
            parts={
                "forward_backward": took.computing - replaying,
                "replaying": replaying,
                "updating": took.updating,
                "exposed": took.exposed,
                "copying": took.copying,
            },
            speed={
                "step_s": took.total,
                "samples_per_second": per_second,
                "tokens_per_second": per_second * (self.job.data.sequence_length or 0),
                "mfu": self.model.flops * self.job.train.global_batch_size / took.total / (self.device.flops * self.workers),
            },
        )

    @cached_property
    def _own(self) -> Counter[str]:
        """Counts the parameters that a worker uses, by module. If experts are sharded, counts only the worker's own experts."""
        parts, counts = self.job.train.parallel.expert, Counter[str]()
        for name, shape in self.shapes.items():
            counts[name.rpartition(".")[0]] += math.prod(shape) // (parts if name in self.model.stacked else 1)
        return counts

    def _traffic(self, layout: Layout, accumulation: int) -> Traffic:
        """Estimates the bytes of weights and gradients that each worker sends per step. If experts are sharded, a worker
        exchanges its experts only with workers that have the same experts."""
        train, parts = self.job.train, self.job.train.parallel.expert
        low, summed = memory.LOW[train.precision], 4 if self._sums_fp32 and accumulation > 1 else memory.LOW[train.precision]
        experts = sum(math.prod(self.model.shapes[name]) for name in self.model.stacked) if parts > 1 else 0
        frozen = sum(math.prod(self.shapes[name]) for name in self.model.frozen)
        trained = sum(map(math.prod, self.shapes.values())) - frozen - experts
        rest = traffic.of(train.zero, layout.stage, trained, low, summed, self.replicas, accumulation, frozen)
        if rest.around:
            layers, buckets = len(self.kept.layers) + 1, -(-trained // memory.BUCKETS["reduce_bucket_size"])
            rest = replace(
                rest, calls=traffic.calls(layout.stage, accumulation, layers, buckets, train.zero.hpz_partition_size is not None)
            )
        if self.tensor > 1:  # one ring per shard; each ring spans as many nodes as all workers
            rest = replace(rest, workers=self.workers, rings=min(self.tensor, self.device.per_node))
        return rest + traffic.volume(experts // parts, low, self.workers // parts, layout.stage, accumulation)

    @property
    def _sums_fp32(self) -> bool:
        return spec.settle(self.job, None).train.grad_accum_dtype == "fp32"

    def _memory(self, layout: Layout, accumulation: int) -> tuple[memory.StateBytes, memory.Need, int]:
        """Estimates three amounts of memory of a worker: the training state, the total by purpose, and the bytes of activations
        on the host."""
        train, model = self.job.train, self.model
        state = memory.state(
            self.shapes,
            model.frozen,
            self._dividing(layout),
            layout.stage,
            train.precision,
            layout.offload_optimizer,
            layout.offload_param,
            self._zero.get("stage3_param_persistence_threshold", memory.BUCKETS["stage3_param_persistence_threshold"]),
            accumulation > 1,
            len(train.averages),
            self._sums_fp32,
            {name: len(kept) for name, kept in model.kept(train.optimizer).items()},
            train.zero.hpz_partition_size if layout.stage == 3 else None,
        )
        parameters, layer = sum(map(math.prod, self.shapes.values())), model.layer
        if train.parallel.expert > 1:
            parameters, layer = self._own.total(), max(self._own.values())
        live = memory.working(parameters, layer, layout.stage, train.precision, self._zero, self.gpu)
        kept, left = self._activations(layout)
        pinned = BATCHES * accumulation * layout.micro_batch_size * self.kept.batch // layout.sequence if self.gpu else 0
        return state, memory.need(state, live, kept, self.gpu, model.frozen_models, left + pinned), left

    def _dividing(self, layout: Layout) -> int:
        """Counts the workers that shard one copy of the state."""
        return (self.job.train.zero.shard_group_size if layout.stage == 3 else None) or self.replicas

    def _activations(self, layout: Layout) -> tuple[int, int]:
        """Estimates the bytes of activations on a worker's device, and the bytes that the worker offloads to its host."""
        train, length, first = self.job.train, self.job.data.sequence_length or 0, self._checkpointed(layout)
        selective = layout.checkpointing == SELECTIVE
        most = self.kept.selective() if selective else self.kept.held(first, train.activation_offload)
        kept = (most + self.kept.largest) * layout.micro_batch_size // layout.sequence
        left = self.kept.inputs(first) * layout.micro_batch_size // layout.sequence if train.activation_offload else 0
        if layout.sequence > 1 and self.job.data.document_mask:  # each worker makes the mask of the complete sample
            from heliostat.parallel import document_attention

            kept += layout.micro_batch_size * document_attention.mask_bytes(length, memory.LOW[train.precision])
        if layout.sequence > 1 and train.tiled_loss:  # the gradient of the last layer's weight isn't sharded
            kept += 4 * self.model.layer
        if self.kept.tile:
            kept += self.kept.tile.held(layout.micro_batch_size * length // layout.sequence)
        return kept, left

    def _time(self, layout: Layout, accumulation: int, moved: Traffic, on_host: int) -> tuple[step_time.StepSeconds, float, int]:
        """Estimates the time of a step. Returns the step's seconds by part, the seconds of recomputing the forward pass, and the
        bytes of samples, tokens, and complete matrices that workers exchange. `on_host`: bytes that move to the host and back per
        step."""
        micro_batch_size, first = layout.micro_batch_size / layout.sequence, self._checkpointed(layout)
        replayed = first / max(1, len(self.kept.layers))
        reducing = self.workers if self.replicas > 1 else 1  # one worker per group; they span as many nodes as all workers
        train, selective = self.job.train, layout.checkpointing == SELECTIVE
        setting = step_time.Setting(
            reducing, layout.stage, micro_batch_size, accumulation, replayed, bool(train.compile), selective, train.fp8
        )
        low = memory.LOW[self.job.train.precision]
        elements = self.exchanged[layout.sequence]
        handed, handing = step_time.exchanging(elements, layout.sequence, low, setting, self.device, self.network)
        if (parts := self.job.train.parallel.expert) > 1:
            each = replace(setting, micro_batch_size=micro_batch_size / parts)  # per part: `exchanging` multiplies by `parts`
            away = self.model.sent * (parts - 1) // parts
            tokens, seconds = step_time.exchanging(away, parts, low, each, self.device, self.network)
            handed, handing = handed + tokens, handing + seconds
        if self.tensor > 1:
            forward, backward = (n * (self.job.data.sequence_length or 0) for n in self.model.added())
            sums, seconds = step_time.adding(
                (forward, backward), self.model.sums(), self.tensor, low, setting, self.device, self.network
            )
            handed, handing = handed + sums, handing + seconds
        whole, gathering, orthogonal = self._orthogonalizing(layout.stage)
        handed, handing = handed + whole, handing + gathering
        key = layout.micro_batch_size, first, selective, layout.stage == 3, layout.sequence
        if key not in self._micro:
            micro = step_time.computing(self.work, setting, self.device)
            self._micro[key] = micro, micro - step_time.computing(self.work, replace(setting, replayed=0.0), self.device)
        micro, replaying = self._micro[key]
        trained = sum(math.prod(s) for s in self.model.trained.values())
        moments = self._moments() / trained if trained else 0.0
        mine = sum(math.prod(self.shapes[n]) for n in self.model.trained)
        share = mine / (self._dividing(layout) if layout.stage else 1)
        updated = orthogonal + step_time.updating(share, moments, self.device, layout.offload_optimizer)
        copied = 2 * on_host / (self.prices["storage"]["host_copy"] * 1e9)
        took = step_time.step(micro, moved, updated, setting, self.device, self.network, copied, handing)
        return took, replaying * accumulation, handed

    def _orthogonalizing(self, stage: int) -> tuple[int, float, float]:
        """Estimates the bytes that a worker sends to assemble matrices for the optimizer's step, the seconds for sending them,
        and the seconds of orthogonalization. All values are 0 unless the optimizer is Muon."""
        optimizer = self.job.train.optimizer
        if not isinstance(optimizer, Muon):
            return 0, 0.0, 0.0
        sides = list(step_time.hidden_sides(self.model))
        sent = step_time.momenta_sent(sum(map(math.prod, sides)), self.workers, stage)
        peak = self.device.peaks.get(optimizer.newton_schulz, self.device.flops)
        computed = step_time.newton_schulz(sides) / (self.workers if stage else 1) / (peak * self.device.efficiency.matmul)
        return sent, sent / (traffic.rate(self.workers, self.device) * self.network.rate), computed

    def _moments(self) -> int:
        """Counts the elements of the complete optimizer state (all moments of all trained parameters)."""
        kept = self.model.kept(self.job.train.optimizer)
        return sum(len(kept[name]) * math.prod(s) for name, s in self.model.trained.items())

    @cached_property
    def _zero(self) -> dict[str, Any]:
        section: dict[str, Any] = engine_config(self.job)["zero_optimization"]
        return section

    def checkpoint(self, chosen: Candidate) -> dict[str, float]:
        """Estimates a checkpoint's bytes and times (seconds), and the interval (steps) that loses the least time to failures."""
        rates, nodes = self.prices["storage"], -(-self.workers // self.device.per_node)
        trained = sum(math.prod(s) for s in self.model.trained.values())
        train = self.job.train
        size = 4 * (1 + len(train.averages)) * trained + STATE_BYTES * self._moments()  # master weights, averages, and moments
        blocked = size / self.workers / (rates["host_copy"] * 1e9) if self.gpu else 0.1
        upload = size / nodes / (rates["node"] * 1e9)
        between = self.between()
        seconds = best_interval(max(blocked, 1e-3), between, upload)
        step_s = chosen.speed["step_s"]
        mine = self.job.checkpoint.every * step_s
        restart = self.prices["node_failures"]["restart_s"]
        return {
            "bytes": size,
            "blocked_s": blocked,
            "upload_s": upload,
            "hours_between_failures": between / HOUR,
            "every": self.job.checkpoint.every,
            "recommended_every": max(1, round(seconds / step_s)),
            "goodput": 1 - waste(mine, blocked, between, restart),
            "recommended_goodput": 1 - waste(max(1, round(seconds / step_s)) * step_s, blocked, between, restart),
        }

    def between(self) -> float:
        return mean_time_between(self.prices["node_failures"]["device_hours"], self.workers * max(1, self.job.workers.gpus))

    def run(self, chosen: Candidate) -> dict[str, float]:
        """Estimates the whole run: time (days), expected failures, energy (kWh), and cost (the price table's currency)."""
        seconds = self.job.train.steps * chosen.speed["step_s"]
        good = max(0.01, self.checkpoint(chosen)["goodput"])
        wall = seconds / good
        hours = wall / HOUR
        energy = self.device.watts * self.workers * self.prices["pue"] * hours / 1000
        return {
            "samples": self.job.train.steps * self.job.train.global_batch_size,
            "tokens": self.job.train.steps * self.job.train.global_batch_size * (self.job.data.sequence_length or 0),
            "days": wall / 86400,
            "failures": wall / self.between(),
            "goodput": good,
            "energy_kwh": energy,
            "energy_cost": energy * self.prices["energy_per_kwh"],
            "cost": self.device.hour * self.workers * hours,
        }


def mean_time_between(device_hours: float, devices: float) -> float:
    """Computes the mean seconds between interruptions of the run. `device_hours`: mean hours between failures of one device. The
    failure rate of the run is the sum of the failure rates of all devices."""
    return device_hours / devices * HOUR


def best_interval(blocked_s: float, between_s: float, upload_s: float = 0.0) -> float:
    """Computes the checkpoint interval in seconds that wastes the least time.

    The interval is never shorter than `upload_s`, the time until a save is in storage, because only one save runs at a time.
    """
    return max(math.sqrt(2 * blocked_s * between_s), upload_s)


def waste(interval_s: float, blocked_s: float, between_s: float, restart_s: float) -> float:
    """Computes the share of time that is spent on saving, recomputing, and restarting; at most 1."""
    return min(1.0, blocked_s / interval_s + (interval_s / 2 + restart_s) / between_s)
