"""Holds the micro-batches of a step, each with its own random numbers, wherever and however often it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from heliostat.recipes.protocol import Batch
from heliostat.training.worker import on_device


class Micro(NamedTuple):
    """Holds a micro-batch, the seed of its random numbers, and its samples' keys, whose order is that of the step's samples."""

    seed: int
    keys: np.ndarray
    batch: Batch


def seeded(micros: Sequence[Micro], device: torch.device, progressed: Callable[[], None]) -> Iterator[tuple[Micro, Batch]]:
    """Yields each with its batch on the device, and its random numbers begun; calls `progressed` after each.

    The host then has handed the micro-batch to the device, whose queue is short: no wait for the device is needed.
    """
    for micro, batch in zip(micros, on_device.batches([micro.batch for micro in micros], device), strict=True):
        torch.manual_seed(micro.seed)
        yield micro, batch
        progressed()
