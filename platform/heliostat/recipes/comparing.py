"""Compares the images of a gallery with real images, on all workers together.

Each worker computes the features of its own part of the images. The first worker gets all features, and computes the scores. The
features of the real images are computed once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from heliostat.recipes.batches import in_order

if TYPE_CHECKING:
    import numpy as np
    import torch

    from heliostat.data.dataset import Dataset

Arrays: TypeAlias = dict[str, "np.ndarray"]  # arrays [n, ...] of n images, by name
Numbered: TypeAlias = tuple["np.ndarray", Arrays]  # int64 [n]: the images' numbers; the images' arrays
# Runs a function on every worker, and returns the results of all workers on the first worker. Returns None on other workers.
Merge: TypeAlias = Callable[[Callable[[], list[Numbered]]], list[Numbered] | None]


@dataclass(frozen=True)
class WorkerPart:
    """Describes the part of one worker: its number, the number of parts, and the worker's device. `progressed`: a function to
    call regularly."""

    number: int
    parts: int
    device: torch.device | str
    progressed: Callable[[], None]


class ComparesImages(ABC):
    """Compares a gallery's images with real images. A gallery derives from this class, and lists the sets of real images in
    `sets`. Without sets, the gallery compares nothing."""

    sets: tuple[str, ...] = ()
    scored: bool = True  # whether the images get any scores

    @abstractmethod
    def real_features(self, name: str, dataset: Dataset, worker: WorkerPart) -> list[Numbered]:
        """Computes features of a worker's part of the real images of the set `name`."""

    @abstractmethod
    def drawn_features(self, drawn: Mapping[int, np.ndarray], worker: WorkerPart) -> list[Numbered]:
        """Computes features of a worker's generated images. `drawn`: uint8 images by number."""

    @abstractmethod
    def compare(
        self, pictures: list[np.ndarray], drawn: Arrays, real: Mapping[str, Arrays], dataset: Dataset, worker: WorkerPart
    ) -> tuple[dict[str, float], dict[str, bytes]]:
        """Scores all generated images on the first worker, from their features and those of each set.

        Returns the scores, and PNG images for the log, both by name.
        """


class Comparing:
    """Holds the features of real images for a gallery. On other workers than the first, the arrays are empty."""

    def __init__(self, gallery: ComparesImages, dataset: Dataset) -> None:
        self.gallery, self.dataset = gallery, dataset
        self.real: dict[str, Arrays] = {}

    def features(self, drawn: Mapping[int, np.ndarray], worker: WorkerPart, merge: Merge) -> Arrays:
        """Computes the features of all workers' generated images, in the order of their numbers. The first call also computes the
        features of the real images. `drawn`: this worker's images by number."""
        if not self.gallery.sets:
            return {}
        for name in self.gallery.sets:
            if name not in self.real:
                self.real[name] = _joined(merge(lambda n=name: self.gallery.real_features(n, self.dataset, worker)))  # type: ignore[misc]
        return _joined(merge(lambda: self.gallery.drawn_features(drawn, worker)))

    def scores(self, pictures: list[np.ndarray], drawn: Arrays, worker: WorkerPart) -> tuple[dict[str, float], dict[str, bytes]]:
        """Computes the scores, and PNG images for the log, both by name. Runs on the first worker."""
        if not self.gallery.sets:
            return {}, {}
        return self.gallery.compare(pictures, drawn, self.real, self.dataset, worker)


def _joined(parts: list[Numbered] | None) -> Arrays:
    return in_order([parts]) if parts else {}
