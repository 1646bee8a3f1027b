"""Computes the losses of fine-tuning by their definition, one sequence after another, for the plain process.

The recipes pack conversations, pad rows, and sum over micro-batches. This module does none of that, and shares no code with their
batches and losses: each conversation and each answer passes through the model alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from heliostat.data.content import Content
from heliostat.numerics import shortening
from heliostat.recipes import adapters
from heliostat.recipes.protocol import Loss, Recipe
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.recipes.text.dpo import DPO
from heliostat.recipes.text.sft import SFT


class PlainLoss(Protocol):
    """Makes batches in any form, and computes their losses. A `Recipe` has these methods, too."""

    def batch(self, content: Content, keys: np.ndarray) -> Any: ...

    def terms(self, batch: Any) -> int: ...

    def loss(self, model: torch.nn.Module, batch: Any) -> Loss: ...


def of(recipe: Recipe) -> PlainLoss:
    """Returns the definition of the recipe's loss if this module has one, else the recipe itself.

    Losses of routers are means over batches, so mixtures of experts keep the recipe's batches.
    """
    if isinstance(recipe, DPO):
        return AlonePairs(recipe)
    if isinstance(recipe, SFT) and not recipe.routes:
        return AloneConversations(recipe)
    return recipe


class AloneConversations:
    """Computes the loss of `SFT`: the cross entropy of the trained tokens of each conversation."""

    def __init__(self, recipe: SFT) -> None:
        self.length, self.vocabulary = recipe.length, vocabulary(recipe)

    def batch(self, content: Content, keys: np.ndarray) -> list[dict[str, list[int]]]:
        """Returns the tokens of each conversation, and the places of its trained tokens."""
        conversations = []
        for row in rows(content, self.length):
            start = 0
            for size in row["lengths"]:
                part = slice(start, start + size)
                places = [place for place, trained in enumerate(row["trained"][part]) if trained and place]
                conversations.append({"tokens": row["tokens"][part], "places": places})
                start += size
        return conversations

    def terms(self, batch: list[dict[str, list[int]]]) -> int:
        return sum(len(one["places"]) for one in batch)

    def loss(self, model: torch.nn.Module, batch: list[dict[str, list[int]]]) -> Loss:
        total = torch.zeros(())
        for one in batch:
            if one["places"]:
                total = total - logprobs(model, one["tokens"], one["places"], self.vocabulary).sum()
        return Loss(total)


class AlonePairs:
    """Computes the loss of `DPO` from the log-probabilities of each answer. The reference of an adapter is its base, which is
    built without an adapter."""

    def __init__(self, recipe: DPO) -> None:
        self.length, self.vocabulary, self.settings = recipe.length, vocabulary(recipe), recipe.settings
        self.base = base(recipe)

    def batch(self, content: Content, keys: np.ndarray) -> list[dict[str, Any]]:
        return rows(content, self.length)

    def terms(self, batch: list[dict[str, Any]]) -> int:
        return len(batch)

    def loss(self, model: torch.nn.Module, batch: list[dict[str, Any]]) -> Loss:
        return Loss(torch.stack([self.pair(model, row) for row in batch]).sum())

    def pair(self, model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
        gains, sizes = [], []
        for name in ("chosen", "rejected"):
            tokens, start = [*row["prompt"], *row[name]], len(row["prompt"])
            places = list(range(start, len(tokens)))
            policy = logprobs(model, tokens, places, self.vocabulary).double().sum()
            gains.append(policy - self.reference(row, name, tokens, places))
            sizes.append(len(places))
        beta, smoothing = self.settings.beta, self.settings.label_smoothing
        if self.settings.loss == "ipo":
            return (gains[0] / sizes[0] - gains[1] / sizes[1] - 0.5 / beta) ** 2
        margin = beta * (gains[0] - gains[1])
        return (1 - smoothing) * F.softplus(-margin) + smoothing * F.softplus(margin)

    def reference(self, row: dict[str, Any], name: str, tokens: Sequence[int], places: Sequence[int]) -> float | torch.Tensor:
        if self.base is None:
            return float(row[f"reference_{name}"])
        with torch.no_grad():
            return logprobs(self.base, tokens, places, self.vocabulary).double().sum()


def base(recipe: DPO) -> torch.nn.Module | None:
    """Builds the reference of an adapter. Returns None if the dataset has the reference's values."""
    if recipe.from_dataset:
        return None
    plain = copy.copy(recipe)
    plain.adapter = None
    model = plain.build().eval()
    adapters.round_base(recipe.adapter, model)
    return model


def vocabulary(recipe: CausalLM) -> int:
    return int(recipe.config.get_text_config(decoder=True).vocab_size)


def rows(content: Content, length: int) -> list[dict[str, Any]]:
    short = shortening.shortened(content, length)
    assert isinstance(short, pa.Table)
    return short.to_pylist()


def logprobs(model: torch.nn.Module, tokens: Sequence[int], places: Sequence[int], vocabulary: int) -> torch.Tensor:
    """Computes the log-probabilities, in nats, of the tokens at some places, fp32 [places]. Each depends on the tokens before."""
    ids = torch.tensor([tokens]) % vocabulary
    logits = model(input_ids=ids).logits[0].float()
    at = torch.tensor(places)
    return F.log_softmax(logits[at - 1], -1).gather(1, ids[0, at].unsqueeze(1)).squeeze(1)
