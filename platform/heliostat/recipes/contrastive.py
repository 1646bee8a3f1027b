"""Computes the contrastive loss of pairs of embeddings, and retrieval scores. All functions are pure.

The loss is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) in both directions: it compares each query with all texts, and
each text with all queries. Two pairs with the same query or the same text aren't negatives of each other. So the loss leaves out
the matrix entries of these two pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 1024  # queries per block; each block is compared with all texts
CUTS = (1, 5, 10)


class Contrast(NamedTuple):
    """Contains the results for some pairs. `loss`: the sum of the pairs' losses, in nats. `masked`: the number of matrix entries
    that the loss leaves out. `right`: the number of queries whose nearest text is the text of the same pair."""

    loss: torch.Tensor
    masked: torch.Tensor
    right: torch.Tensor


def contrast(
    query: torch.Tensor, text: torch.Tensor, names: torch.Tensor, temperature: float, some: slice | None = None
) -> Contrast:
    """Computes the contrastive loss of pairs of embeddings, which have length 1. `query`, `text`: [pairs, width]. `names`: int64
    [pairs, 2], the ids of the query and the text of each pair.

    `some`: a slice of pairs. If given, computes only the contribution of these pairs: their queries against all texts, and their
    texts against all queries. With `some`, the complete matrix of all queries and all texts is never in memory.
    """
    own = torch.arange(len(query), device=query.device)[some or slice(None)]
    mine = names if some is None else names[some]
    same_names = (mine[:, None, 0] == names[None, :, 0]) | (mine[:, None, 1] == names[None, :, 1])
    same_names[torch.arange(len(own), device=own.device), own] = False
    scores = (query if some is None else query[some]) @ text.T / temperature
    scores = scores.masked_fill(same_names, -torch.inf)
    back = scores.T if some is None else (text[some] @ query.T / temperature).masked_fill(same_names, -torch.inf)
    loss = (F.cross_entropy(scores, own, reduction="sum") + F.cross_entropy(back, own, reduction="sum")) / 2
    return Contrast(loss, same_names.sum(), (scores.argmax(1) == own).sum())


def blocks(pairs: int, rows: int = BLOCK) -> list[slice | None]:
    """Splits the range of all pairs into slices of at most `rows` pairs. Returns [None], which means all pairs, if all pairs fit
    into one slice."""
    if pairs <= rows:
        return [None]
    return [slice(start, min(start + rows, pairs)) for start in range(0, pairs, rows)]


def ranks(query: np.ndarray, text: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Computes each pair's rank: the position, from 1, of the nearest correct text among all distinct texts.

    The texts of all pairs with the same query are correct. If several texts have the same distance, the wrong texts come before
    the correct ones.
    """
    _, first, number = np.unique(names[:, 1], return_index=True, return_inverse=True)
    _, query_of = np.unique(names[:, 0], return_inverse=True)
    order, texts = np.argsort(query_of, kind="stable"), text[first]
    begins = np.searchsorted(query_of[order], np.arange(query_of.max() + 2))  # where each query's pairs begin in `order`
    positions = []
    for start in range(0, len(query), BLOCK):
        scores = query[start : start + BLOCK] @ texts.T
        known = np.zeros(scores.shape, dtype=bool)
        for row, one in enumerate(query_of[start : start + BLOCK]):
            known[row, number[order[begins[one] : begins[one + 1]]]] = True
        best = np.where(known, scores, -np.inf).max(1, keepdims=True)
        positions.append(1 + ((scores >= best) & ~known).sum(1))
    return np.concatenate(positions)


def recall(ranks: np.ndarray) -> dict[str, float]:
    """Computes recall at 1, 5, and 10, and the mean reciprocal rank. Recall at k is the fraction of ranks that are at most k."""
    return {**{f"recall_at_{k}": float(np.mean(ranks <= k)) for k in CUTS}, "mrr": float(np.mean(1 / ranks))}
