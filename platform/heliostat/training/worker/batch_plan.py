"""Gives every sample of a step its key, and every micro-batch its seed, whoever plays it."""

from __future__ import annotations

import numpy as np

from heliostat.config.spec import Job
from heliostat.data.dataset import DataPlan


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
