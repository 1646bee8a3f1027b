"""Hands a step's micro-batches to the device: a GPU gets the next one, from pinned memory, while it computes the one before."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from heliostat.recipes.protocol import Batch


def batches(micros: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields micro-batches, which are on the CPU, on the device."""
    if device.type != "cuda":
        yield from ({name: values.to(device) for name, values in micro.items()} for micro in micros)
        return
    beside = _stream(device)
    ahead = _copied(micros[0], device, beside)
    for following in (*micros[1:], None):
        now, computing = ahead, torch.cuda.current_stream(device)
        computing.wait_stream(beside)
        for values in now.values():
            values.record_stream(computing)  # its memory is not given away before what computes with it is done
        if following is not None:
            ahead = _copied(following, device, beside)
        yield now


def _copied(micro: Batch, device: torch.device, beside: Any) -> Batch:
    with torch.cuda.stream(beside):
        return {name: values.pin_memory().to(device, non_blocking=True) for name, values in micro.items()}


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
