"""Measures the distance between generated and real images, in the features of an image model on disk.

FID: the Frechet distance between normal distributions fitted to the features (Heusel et al. 2017, arXiv 1706.08500). KID: the
unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401). For few
images, FID is biased, and KID isn't.

Compare only values with the same extractor and the same numbers of images. The real images go through the model once
(`Reference`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from heliostat.data.manifest import Manifest
from heliostat.recipes.images.judge import real_images
from heliostat.recipes.pretrained import from_folder

ROWS = 1024  # rows of the kernel matrix that are computed at a time


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the FID of features [n, d] and [m, d]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = _root(first)
    crossed = np.linalg.eigvalsh(root @ second @ root).clip(min=0)
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(first) + np.trace(second) - 2 * np.sqrt(crossed).sum())


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def kid(a: np.ndarray, b: np.ndarray) -> float:
    return float(_alike(a, a, same=True) + _alike(b, b, same=True) - 2 * _alike(a, b))


def _alike(a: np.ndarray, b: np.ndarray, same: bool = False) -> float:
    """Averages the KID kernel over all pairs of an image in `a` and an image in `b`. `same`: leaves out the pairs of an image
    with itself."""
    total = sum(float(_kernel(a[i : i + ROWS], b).sum()) for i in range(0, len(a), ROWS))
    return (total - float(_kernel_of_itself(a).sum())) / (len(a) * (len(a) - 1)) if same else total / (len(a) * len(b))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3


def _kernel_of_itself(a: np.ndarray) -> np.ndarray:
    return (np.square(a.astype(np.float64)).sum(1) / a.shape[1] + 1) ** 3


def shares(rows: list[int], limit: int) -> list[int]:
    """Divides `limit` images among the datasets in proportion to their sizes.

    If the datasets have fewer images in total, uses all images. The images that remain after rounding down come from the first
    datasets. Returns the number of images per dataset.
    """
    total = max(1, sum(rows))
    taken = [n * min(limit, total) // total for n in rows]
    for i, n in enumerate(rows):
        taken[i] += min(n - taken[i], min(limit, total) - sum(taken))
    return taken


class Reference:
    """Contains the features of at most `limit` real images, from every dataset. The features are the same in every evaluation."""

    def __init__(self, folder: str, sources: list[Manifest], limit: int, progressed: Callable[[], None] = lambda: None) -> None:
        """Extracts the features of at most `limit` real images with the model in `folder`. Calls `progressed` for every row
        group, and for every 32 images that go through the model."""
        parts = zip(sources, shares([source.rows for source in sources], limit), strict=True)
        self.folder = folder
        self.known = extract(folder, [image for source, count in parts for image in real_images([source], count, progressed)[0]],
                             progressed)  # fmt: skip
        self._within = _alike(self.known, self.known, same=True)

    def distances(self, pictures: list[np.ndarray], progressed: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Computes the FID and the KID between generated and real images. Also returns the number of real images."""
        drawn = extract(self.folder, pictures, progressed)
        near = _alike(drawn, drawn, same=True) + self._within - 2 * _alike(drawn, self.known)
        return {"fid": fid(drawn, self.known), "kid": near, "real_images": float(len(self.known))}


@torch.no_grad()
def extract(folder: str, pictures: list[np.ndarray], progressed: Callable[[], None] = lambda: None) -> np.ndarray:
    """Extracts features [n, d]: the pooled output of the folder's image model. Calls `progressed` for every 32 images."""
    from transformers import AutoImageProcessor, AutoModel

    processor = from_folder("model.samples.features.pretrained", AutoImageProcessor, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = from_folder("model.samples.features.pretrained", AutoModel, folder).eval().to(device)
    out = []
    for first in range(0, len(pictures), 32):
        three = [p.repeat(3, 2) if p.shape[2] == 1 else p for p in pictures[first : first + 32]]
        features = model(**processor(images=three, return_tensors="pt").to(device))
        out.append(features.pooler_output.flatten(1).float().cpu().numpy())
        progressed()
    return np.concatenate(out)
