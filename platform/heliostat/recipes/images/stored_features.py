"""Defines how a dataset stores the features of its images, and reads them for training. All functions are pure.
`stored_arrays` does the same for latents and embeddings.

A row has the features of an image's patches on a grid, [rows, columns, channels], as float16, or as int8. With int8, each channel
of each image has its own float16 scale: the largest absolute value of the channel divided by 127. So the error depends only on
the image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

LARGEST = 127  # of int8, symmetric
StoredType = Literal["float16", "int8"]


def quantized(numbers: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds fp32 numbers to int8. The numbers along `dim` share a scale. Returns the scales, float16, with length 1 along `dim`,
    and the rounded numbers."""
    scale = (numbers.abs().amax(dim, keepdim=True) / LARGEST).half()
    divisor = torch.where(scale > 0, scale, 1).float()
    return scale, (numbers / divisor).round().clamp(-LARGEST, LARGEST).to(torch.int8)


@dataclass(frozen=True)
class FeatureFormat:
    """Describes the stored features of a dataset. `model`: the digest of the image model."""

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
    def row_bytes(self) -> int:
        patches = self.grid[0] * self.grid[1] * self.channels
        return 2 * patches if self.dtype == "float16" else patches + 2 * self.channels

    def pack(self, features: np.ndarray) -> bytes:
        """Packs the features of one image, float [rows, columns, channels]."""
        if self.dtype == "float16":
            return features.astype(np.float16).tobytes()
        scale, numbers = quantized(torch.from_numpy(features.reshape(-1, self.channels).astype(np.float32)), 0)
        return scale.numpy().tobytes() + numbers.numpy().tobytes()

    def unpack(self, rows: list[bytes]) -> dict[str, torch.Tensor]:
        """Unpacks the features of several images: `features` [n, rows, columns, channels] in the stored type, and for int8 also
        `feature_scale`, fp32 [n, 1, 1, channels]."""
        raw = torch.from_numpy(np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1).copy())
        if self.dtype == "float16":
            return {"features": raw.view(torch.float16).view(len(rows), *self.grid, self.channels)}
        scale, numbers = raw[:, : 2 * self.channels].contiguous(), raw[:, 2 * self.channels :].contiguous()
        return {
            "features": numbers.view(torch.int8).view(len(rows), *self.grid, self.channels),
            "feature_scale": scale.view(torch.float16).float().view(len(rows), 1, 1, self.channels),
        }

    def restored(self, row: bytes) -> np.ndarray:
        """Returns the features of one image as training gets them, fp32 [rows, columns, channels]."""
        return values(self.unpack([row]))[0].numpy()


def values(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the features of a batch, fp32 [n, rows, columns, channels]."""
    features = batch["features"].float()
    return features * batch["feature_scale"] if "feature_scale" in batch else features


@dataclass(frozen=True)
class FeatureError:
    """Sums the errors that storing adds to features: squares of the features, squares of the errors, and one minus the cosine
    similarity of each patch."""

    squares: float = 0.0
    missed: float = 0.0
    turned: float = 0.0
    patches: int = 0

    @classmethod
    def between(cls, exact: np.ndarray, stored: np.ndarray) -> FeatureError:
        """Measures one image. Both arrays: [rows, columns, channels]."""
        a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (exact, stored))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = np.divide((a * b).sum(1), norms, out=np.ones(len(a)), where=norms > 0)
        return cls(float((a**2).sum()), float(((a - b) ** 2).sum()), float((1 - cosine).sum()), len(a))

    def __add__(self, other: FeatureError) -> FeatureError:
        return FeatureError(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    def named(self) -> dict[str, float]:
        """Returns the relative error of the values (root mean square), and one minus the mean cosine similarity."""
        relative = (self.missed / self.squares) ** 0.5 if self.squares else 0.0
        return {"relative_error": float(f"{relative:.3g}"), "cosine_error": float(f"{self.turned / max(1, self.patches):.3g}")}
