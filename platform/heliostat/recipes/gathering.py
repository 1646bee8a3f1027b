"""Gathers scores that are not summed: a value of each held-out sample, from all workers, in the samples' order."""

from __future__ import annotations

import numpy as np
import torch


def taken(scores: dict[str, torch.Tensor], names: tuple[str, ...], counted: np.ndarray) -> dict[str, np.ndarray]:
    """Takes the gathered scores of one batch, without the samples that do not count; bf16, which NumPy lacks, becomes fp32."""
    tensors = {n: scores[n].detach().cpu() for n in names}
    return {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy()[counted] for n, t in tensors.items()}


def in_order(parts: list[list[tuple[np.ndarray, dict[str, np.ndarray]]]]) -> dict[str, np.ndarray]:
    """Concatenates the scores of all workers to one array per name, in the order of the samples' numbers."""
    batches = [batch for part in parts for batch in part]
    order = np.argsort(np.concatenate([numbers for numbers, _ in batches]))
    return {name: np.concatenate([arrays[name] for _, arrays in batches])[order] for name in batches[0][1]}
