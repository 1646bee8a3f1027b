"""How near drawn images are to real ones, in the features of an image model that lies on disk.

FID: the Frechet distance between normal distributions fitted to the features (Heusel et al. 2017, arXiv 1706.08500). KID: the
unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401), which is
fair to few images, where FID is not. Both say how near, not how good: compare only figures of one extractor and one count of
images.
"""

from __future__ import annotations

import numpy as np
import torch

from jobs.pretrained import from_folder


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Of features [n, d] and [m, d]."""
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
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m, d = len(a), len(b), a.shape[1]
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * ab.mean())


def distances(folder: str, pictures: list[np.ndarray], real: list[np.ndarray]) -> dict[str, float]:
    drawn, known = extract(folder, pictures), extract(folder, real)
    return {"fid": fid(drawn, known), "kid": kid(drawn, known)}


@torch.no_grad()
def extract(folder: str, pictures: list[np.ndarray]) -> np.ndarray:
    """[n, d], the pooled output of the folder's image model."""
    from transformers import AutoImageProcessor, AutoModel

    processor = from_folder("model.samples.features.pretrained", AutoImageProcessor, folder)
    model = from_folder("model.samples.features.pretrained", AutoModel, folder).eval()
    out = []
    for first in range(0, len(pictures), 32):
        three = [p.repeat(3, 2) if p.shape[2] == 1 else p for p in pictures[first : first + 32]]
        found = model(**processor(images=three, return_tensors="pt"))
        out.append(found.pooler_output.flatten(1).numpy())
    return np.concatenate(out)
