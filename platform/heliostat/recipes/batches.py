"""Helps recipes build batches: pads rows, finds the documents of packed samples, and gathers the scores of all samples in
order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Padded(NamedTuple):
    """Contains rows that are padded to the same length. `values`: int64 [rows, length]. `mask`: bool, true for real values.
    `cut`: the number of values that `pad` left out because of its limit `longest`."""

    values: torch.Tensor
    mask: torch.Tensor
    cut: int

    @property
    def padding(self) -> float:
        """Returns the fraction of positions that are padding."""
        return 1.0 - float(self.mask.float().mean())


def pad(rows: Sequence[Sequence[int] | np.ndarray], fill: int = 0, longest: int | None = None, multiple: int = 8) -> Padded:
    """Pads rows of different lengths with `fill` to one length, and returns the rows as one tensor.

    The tensor is as long as the longest row, rounded up to a multiple of `multiple`, but at most `longest`. Rounding limits the
    number of different shapes.
    """
    whole = [len(row) for row in rows]
    lengths = np.array([min(n, longest) if longest else n for n in whole], dtype=np.int64)
    width = max(multiple, -(-int(lengths.max(initial=0)) // multiple) * multiple)
    width = min(width, longest) if longest else width
    values = np.full((len(whole), width), fill, dtype=np.int64)
    mask = np.arange(width) < lengths[:, None]
    if lengths.sum():
        values[mask] = np.concatenate([np.asarray(row, dtype=np.int64)[:n] for row, n in zip(rows, lengths, strict=True)])
    return Padded(torch.from_numpy(values), torch.from_numpy(mask), int(sum(whole) - lengths.sum()))


class Segments(NamedTuple):
    """Describes the documents of packed samples. Each tensor is [rows, length].

    `starts`: bool, true for a token that starts a document, except a sample's first token. `ids`: each token's document number in
    its sample. `positions`: each token's position in its document.
    """

    starts: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor


def segments(tokens: torch.Tensor, end: int) -> Segments:
    """Finds the documents in packed samples. A document starts after each `end` token."""
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == end
    place = torch.arange(tokens.shape[1])
    return Segments(starts, starts.long().cumsum(1), place - torch.where(starts, place, 0).cummax(dim=1).values)


def taken(scores: dict[str, torch.Tensor], names: tuple[str, ...], counted: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the scores in `names` of one batch as NumPy arrays, for the samples where `counted` is true. Converts bf16 to fp32,
    because NumPy has no bf16."""
    tensors = {n: scores[n].detach().cpu() for n in names}
    return {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy()[counted] for n, t in tensors.items()}


def in_order(parts: list[list[tuple[np.ndarray, dict[str, np.ndarray]]]]) -> dict[str, np.ndarray]:
    """Concatenates the scores of all workers into one array per name, ordered by the samples' numbers."""
    batches = [batch for part in parts for batch in part]
    order = np.argsort(np.concatenate([numbers for numbers, _ in batches]))
    return {name: np.concatenate([arrays[name] for _, arrays in batches])[order] for name in batches[0][1]}
