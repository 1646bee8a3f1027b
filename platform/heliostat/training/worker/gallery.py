"""Draws a recipe's pictures after an evaluation: all workers share the drawing, rank 0 scores, every rank gets the scores.

A recipe's `gallery()` has `count` pictures; picture i follows from the weights and i alone, so it does not matter which worker
draws it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from heliostat.checkpoint import agreement
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
    pictures = agreement.merged(group, lambda: dict(zip(mine, drawn, strict=True)), operator.or_) or {}
    images: dict[str, bytes] = {}

    def judge() -> dict[str, float]:
        scores, made = gallery.judge([pictures[n] for n in range(gallery.count)], progressed)
        images.update(made)
        return scores

    return agreement.first(group, judge), images
