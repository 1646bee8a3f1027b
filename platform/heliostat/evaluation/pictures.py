"""Draws the images of an exported image model in this process, and scores these images as training does."""

from __future__ import annotations

import numpy as np
import torch

from heliostat.data.dataset import Dataset
from heliostat.recipes.comparing import ComparesImages, Comparing, WorkerPart
from heliostat.recipes.protocol import Draws, Recipe

AT_ONCE = 16  # pictures per call of `draw`


def scores(recipe: Recipe, model: torch.nn.Module, dataset: Dataset, device: str) -> dict[str, float]:
    """Computes the scores of the job's prompts and seeds. Returns {} if the recipe draws nothing, or if the job doesn't score its
    images."""
    gallery = recipe.gallery() if isinstance(recipe, Draws) else None
    if gallery is None or not isinstance(gallery, ComparesImages) or not gallery.scored:
        return {}
    worker, pictures = WorkerPart(0, 1, device, lambda: None), list[np.ndarray]()
    with torch.no_grad():
        for first in range(0, gallery.count, AT_ONCE):
            pictures += gallery.draw(model, device, list(range(first, min(first + AT_ONCE, gallery.count))))
    judged, _ = gallery.judge(pictures, worker.progressed)
    comparing = Comparing(gallery, dataset)
    compared, _ = comparing.scores(pictures, comparing.features(dict(enumerate(pictures)), worker, lambda work: work()), worker)
    return judged | compared


def line(scores: dict[str, float]) -> str:
    """Formats scores as one line. A score with bounds is shown with its interval, for example `kid 0.012 [0.01, 0.014]`."""
    bounds = {f"{name}{end}" for name in scores for end in ("_low", "_high")} & scores.keys()
    return "  ".join(
        f"{name.replace('_', ' ')} {value:.6g}" + _interval(scores, name) for name, value in scores.items() if name not in bounds
    )


def _interval(scores: dict[str, float], name: str) -> str:
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    return "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
