"""Estimates how long a step takes, and what it moves: pure functions over FLOPs, bytes and rates.

These are estimates from stated shares of the peaks (`efficiency` in prices.yaml), not measurements. docs/plan.md has the
formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heliostat.plan.hardware import Device


def volume(numel: int, low: int, workers: int, stage: int, accumulation: int) -> int:
    """Computes the bytes that each worker sends in an optimizer step with ring collectives (it receives as many).

    Psi parameters: an all-reduce moves 2 Psi, a reduce-scatter or an all-gather Psi (Rajbhandari et al. 2020, section 7).
    Stages 0 and 1 reduce once a step; stage 2 after every micro-batch, because it keeps only its part of the gradients;
    stage 3 gathers the weights twice and reduces once in every micro-batch.
    """
    times = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[stage]
    return int(times * numel * low * (workers - 1) / workers)


@dataclass(frozen=True)
class Step:
    """Holds the seconds of one optimizer step."""

    computing: float
    communicating: float
    exposed: float  # the part of it that does not hide behind computing

    @property
    def total(self) -> float:
        return self.computing + self.exposed


def step(
    flops: float, moved: int, workers: int, device: Device, efficiency: Mapping[str, Any], offloaded: int = 0, copy: float = 20e9
) -> Step:
    """Estimates the seconds of one optimizer step: computing, communicating, and the part that computing does not hide.

    `flops`: of one worker in a step, recomputing included; `moved`: bytes that each worker sends; `offloaded`: bytes to and from
    host memory, at `copy` bytes per second. A ring passes from GPU to GPU inside a node, and from node to node through all of the
    node's network cards together.
    """
    share = efficiency["compute_cpu" if device.name == "cpu" else "compute"]
    computing = flops / (device.flops * share)
    rate = device.link if workers <= device.per_node else min(device.link, device.network)
    communicating = moved / (rate * efficiency["network"]) if workers > 1 else 0.0
    hidden = min(communicating * efficiency["overlap"], computing)
    return Step(computing, communicating, communicating - hidden + offloaded / copy)
