"""Describes the features of an image model that a dataset stores (`stored_arrays`), and the error that storing adds. All
functions are pure.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from heliostat.recipes.images.stored_arrays import PATCHES, ArrayFormat, StoredType, scaled


@dataclass(frozen=True)
class FeatureFormat:
    """Describes the stored features of a dataset, on a grid of patches. `model`: the digest of the image model."""

    model: str
    dtype: StoredType
    grid: tuple[int, int]
    channels: int

    @classmethod
    def of(cls, meta: dict[str, Any] | None) -> FeatureFormat | None:
        """Reads the format from the entry `features` of a manifest; None if the dataset has no features."""
        if not meta:
            return None
        return cls(meta["model"], meta["dtype"], (meta["grid"][0], meta["grid"][1]), meta["channels"])

    def named(self) -> dict[str, Any]:
        """Returns the format as an entry of a manifest."""
        return {**asdict(self), "grid": list(self.grid)}

    @property
    def arrays(self) -> ArrayFormat:
        """Returns the format of the column."""
        return ArrayFormat((*self.grid, self.channels), self.dtype, PATCHES)

    def batch(self, rows: list[bytes]) -> dict[str, torch.Tensor]:
        """Reads the features of several images in the stored type: `features`, and for int8 also `feature_scale`."""
        numbers, scales = self.arrays.parts(rows)
        return {"features": numbers} if scales is None else {"features": numbers, "feature_scale": scales}


def values(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the features of a batch, fp32 [n, rows, columns, channels]."""
    return scaled(batch["features"], batch.get("feature_scale"))


@dataclass(frozen=True)
class FeatureError:
    """Sums the errors that storing adds to features: squares of the features, squares of the errors, and one minus the cosine
    similarity of each patch."""

    squares: float = 0.0
    missed: float = 0.0
    turned: float = 0.0
    patches: int = 0

    @classmethod
    def between(cls, exact: torch.Tensor, stored: torch.Tensor) -> FeatureError:
        """Measures some images. Both tensors: [..., channels]."""
        a, b = (x.reshape(-1, x.shape[-1]).double() for x in (exact, stored))
        norms = a.norm(dim=1) * b.norm(dim=1)
        cosine = torch.where(norms > 0, (a * b).sum(1) / norms, 1.0)
        return cls(float(a.square().sum()), float((a - b).square().sum()), float((1 - cosine).sum()), len(a))

    def __add__(self, other: FeatureError) -> FeatureError:
        return FeatureError(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    def named(self) -> dict[str, float]:
        """Returns the relative error of the values (root mean square), and one minus the mean cosine similarity."""
        relative = (self.missed / self.squares) ** 0.5 if self.squares else 0.0
        return {"relative_error": float(f"{relative:.3g}"), "cosine_error": float(f"{self.turned / max(1, self.patches):.3g}")}
