"""Makes a step's micro-batches: their samples' keys, their random numbers, and their way to the device.

Keys and seeds follow from the step and a sample's place in the global batch, whichever worker computes it, and however often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from heliostat.config.spec import Job
from heliostat.data.dataset import DataPlan
from heliostat.data.device_streams import on_device
from heliostat.data.stream import StepSamples
from heliostat.recipes.protocol import Batch, Recipe


class BatchPlan:
    """Assigns random seeds to samples rather than to workers."""

    def __init__(self, job: Job, plan: DataPlan) -> None:
        self.seed_base, self.micro, self.per_lane = job.train.seed, job.train.micro_batch, plan.shape.per_lane
        self.batch = plan.shape.batch

    def keys(self, step: int, lanes: range) -> np.ndarray:
        """Computes a key for each of this worker's samples, lanes in order: from the step and its place in the global batch."""
        return (step * self.batch + np.array(lanes)[:, None] * self.per_lane + np.arange(self.per_lane)).ravel()

    def seed(self, step: int, lanes: range, micro: int, part: int = 0) -> int:
        """Computes the seed of this worker's micro-batch from the step, the place of its first sample in the global batch, and
        the part of its samples that the worker has."""
        lane, inside = divmod(micro * self.micro, self.per_lane)
        place = lanes[lane] * self.per_lane + inside
        entropy = [self.seed_base, step, place] + ([part] if part else [])
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Micro(NamedTuple):
    """Holds a micro-batch, the seed of its random numbers, and its samples' keys, whose order is that of the step's samples."""

    seed: int
    keys: np.ndarray
    batch: Batch


class StepBatches(NamedTuple):
    """Holds a worker's share of a step: its samples; the micro-batches made of them; and the number of loss terms in these, fp32
    without dimensions, 0 where every sample has as many. Tensors are where a copy to the device needs no wait."""

    samples: StepSamples
    micros: list[Micro]
    terms: torch.Tensor


def seeded(
    micros: Sequence[Micro], device: torch.device, recipe: Recipe, progressed: Callable[[], None]
) -> Iterator[tuple[Micro, Batch]]:
    """Yields each with its completed batch on the device, and its random numbers begun; calls `progressed` after each.

    The host then has handed the micro-batch to the device, whose queue is short: no wait for the device is needed.
    """
    for micro, batch in zip(micros, on_device([micro.batch for micro in micros], device, recipe.complete), strict=True):
        torch.manual_seed(micro.seed)
        yield micro, batch
        progressed()
