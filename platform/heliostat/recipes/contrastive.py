"""Computes the contrastive loss of pairs of embeddings, and retrieval scores. Pure functions.

The loss is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) in both directions: each query against all texts, each text
against all queries. Pairs with the same query or text aren't negatives of each other, and are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 1024  # queries that are compared with all texts together; fewer pairs are one matrix
CUTS = (1, 5, 10)


class Contrast(NamedTuple):
    """Holds the sum of the loss over the pairs in nats, the number of matrix entries that were left out, and the number of
    queries whose nearest text is their own."""

    loss: torch.Tensor
    masked: torch.Tensor
    right: torch.Tensor


def contrast(
    query: torch.Tensor, text: torch.Tensor, names: torch.Tensor, temperature: float, some: slice | None = None
) -> Contrast:
    """Computes the contrastive loss of pairs of embeddings of length 1, [pairs, width] each. `names`, int64 [pairs, 2]: ids of
    the query and the text of each pair.

    `some`: computes only what these pairs add: their queries against all texts and their texts against all queries. The matrix
    of all pairs is never in memory.
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
    """Splits so many pairs into slices of at most `rows`; [None], which means all, if they fit in one."""
    if pairs <= rows:
        return [None]
    return [slice(start, min(start + rows, pairs)) for start in range(0, pairs, rows)]


def ranks(query: np.ndarray, text: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Returns for each pair the rank, from 1, of the nearest correct text among all different texts. Correct are the texts of
    all pairs with the same query. Among equal distances, wrong texts come first."""
    _, first, number = np.unique(names[:, 1], return_index=True, return_inverse=True)
    _, query_of = np.unique(names[:, 0], return_inverse=True)
    order, texts = np.argsort(query_of, kind="stable"), text[first]
    begins = np.searchsorted(query_of[order], np.arange(query_of.max() + 2))  # of each query's pairs, in that order
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
    """Computes recall (the fraction of queries whose text is among the nearest), and the mean reciprocal rank."""
    return {**{f"recall_at_{k}": float(np.mean(ranks <= k)) for k in CUTS}, "mrr": float(np.mean(1 / ranks))}
