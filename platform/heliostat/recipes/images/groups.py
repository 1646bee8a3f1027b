"""Checks that consecutive samples of a step are always in the same micro-batch, for losses that couple them."""

from __future__ import annotations

from heliostat.config.spec import Job
from heliostat.errors import ConfigError


def require_groups(key: str, size: int, job: Job) -> None:
    """Raises ConfigError unless groups of `size` consecutive samples fill each micro-batch, and each virtual rank's share of a
    step. Then each group is in one micro-batch, at the same positions, on any number of workers. `key`: the key that needs the
    groups."""
    micro, share = job.train.micro_batch_size, job.train.global_batch_size // job.virtual_ranks
    for name, samples in (("train.micro_batch_size", micro), ("train.global_batch_size / data.virtual_ranks", share)):
        if samples % size:
            raise ConfigError(
                f"{key}: needs groups of {size} consecutive samples, but {name} is {samples}. Use a multiple of {size}"
            )
