"""Hands tensors from one process of the trial to another, by files that are whole once they have their name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

POLL_S = 0.05


def write(place: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    made = place.with_name(f"{place.name}.part.npz")
    np.savez(made, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    made.rename(place)


def read(place: Path, seconds: float) -> dict[str, torch.Tensor]:
    """Reads the tensors of a file, which is waited for so long; TimeoutError if it does not come."""
    until = time.monotonic() + seconds
    while not place.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{place.name} did not come within {seconds:.0f} s")
        time.sleep(POLL_S)
    with np.load(place, allow_pickle=False) as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}
