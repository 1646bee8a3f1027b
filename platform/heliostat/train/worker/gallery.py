"""Draws a recipe's pictures after an evaluation: all workers share the drawing, rank 0 scores, every rank gets the scores.

A recipe's `gallery()` has `count` pictures; picture i follows from the weights and i alone, so it does not matter which worker
draws it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from heliostat.recipes.protocol import Gallery

AT_ONCE = 64


@torch.no_grad()
def show(
    gallery: Gallery, model: Any, device: Any, group: Any, progressed: Callable[[], None]
) -> tuple[dict[str, float], dict[str, bytes]]:
    """Draws the gallery; returns the scores, on every rank, and the PNG images by name, on rank 0.

    Collective: every rank draws equally many, for ZeRO-3's sake. Calls `progressed` now and then.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    each = -(-gallery.count // world)
    mine = [min(rank + i * world, gallery.count - 1) for i in range(each)]
    drawn = []
    for first in range(0, each, AT_ONCE):
        drawn += gallery.draw(model, device, mine[first : first + AT_ONCE])
        progressed()
    parts: list[Any] = [None] * world
    dist.gather_object((mine, drawn), parts if rank == 0 else None, dst=0, group=group)
    told: list[Any] = [None]
    images: dict[str, bytes] = {}
    if rank == 0:
        by_number = {n: picture for numbers, pictures in parts for n, picture in zip(numbers, pictures, strict=True)}
        scores, images = gallery.judge([by_number[n] for n in range(gallery.count)], progressed)
        told = [scores]
    dist.broadcast_object_list(told, src=0, group=group)
    return told[0], images
