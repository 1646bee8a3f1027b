"""Chooses the types of weights and of computations, by `train.precision` or by the model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from heliostat.recipes.exported import RECORD

if TYPE_CHECKING:  # jobs are checked without torch
    import torch

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dtype_of(precision: str) -> torch.dtype:
    """Returns torch's type of a precision: fp32, bf16, or fp16."""
    import torch

    dtype: torch.dtype = getattr(torch, TYPES[precision])
    return dtype


def compute_dtype(folder: str | Path) -> torch.dtype | Literal["auto"]:
    """Returns the type in which heliostat's inference computes with a folder's model. For a model that heliostat exported: fp32,
    because an answer in bf16 depends on its batch. For other models: `auto`, the type in config.json."""
    return dtype_of("fp32") if (Path(folder) / RECORD).is_file() else "auto"
