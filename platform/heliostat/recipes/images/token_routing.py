"""Routes tokens around blocks in training, which makes steps cheaper (TREAD: Krause et al. 2025, arXiv 2501.04765).

In each forward pass of the training, a random share of an image's tokens skips the blocks `from` to `to`. After block `to`, these
tokens are put back into their places, with the values that they had before block `from`. Evaluation and sampling use all tokens
in all blocks.

The tokens that skip depend only on train.seed and the sample's key. So they are the same on any number of workers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from pydantic import Field, model_validator

from heliostat.errors import ConfigError
from heliostat.recipes import counter_random
from heliostat.recipes.images import blocks
from heliostat.recipes.images.blocks import TokenRouter
from heliostat.schema import Float, Strict

log = logging.getLogger(__name__)

STREAM = 64  # of a sample's random numbers (`counter_random`)
FEW_TOKENS = 1024  # below this number of tokens, published results don't agree that routing helps


class Tread(Strict):
    first: int = Field(gt=0, alias="from")
    """First block that the tokens skip, counted from 1."""
    last: int = Field(gt=0, alias="to")
    """Last block that the tokens skip."""
    share: Float = Field(default=0.5, gt=0, lt=1)
    """Share of an image's tokens that skip these blocks."""

    @model_validator(mode="after")
    def _ordered(self) -> Tread:
        if self.last < self.first:
            raise ValueError(f"to: {self.last} is before from: {self.first}. Use a block from {self.first} on")
        return self


def kept(seed: int, keys: torch.Tensor, tokens: int, share: float) -> torch.Tensor:
    """Chooses the tokens of each sample that go through all blocks: ascending indices, int64 [samples, kept]. `keys`: int64
    [samples]."""
    number = max(1, tokens - round(share * tokens))
    drawn = counter_random.words(seed, keys, STREAM, tokens)
    return drawn.argsort(dim=1, stable=True)[:, :number].sort(dim=1).values


class KeyedRouter:
    """Routes the tokens of a backbone. `keys`: the keys of the samples in the current forward pass; None: no routing."""

    def __init__(self, tread: Tread, backbone: Any, seed: int) -> None:
        key = "model.tread"
        blocks.require_routing(key, backbone)
        last = blocks.block(f"{key}.to", backbone, tread.last)
        listed = blocks.blocks(key, backbone)
        self.tread, self.seed = tread, seed
        self.keys: torch.Tensor | None = None
        between = listed[tread.first - 1 : tread.last]
        TokenRouter(backbone, between[0], between, last, self._chosen)

    def _chosen(self, hidden: torch.Tensor) -> torch.Tensor | None:
        return None if self.keys is None else kept(self.seed, self.keys, hidden.shape[1], self.tread.share)


def require_apart(tread: Tread | None, layer: int | None) -> None:
    """Raises ConfigError if `model.repa` reads a block whose output lacks the tokens that skip."""
    if tread and layer and tread.first <= layer < tread.last:
        raise ConfigError(
            f"model.repa.layer: {layer} is inside model.tread ({tread.first} to {tread.last}), where tokens are missing. "
            f"Use a block before {tread.first}, or from {tread.last} on"
        )


def note_few_tokens(tread: Tread | None, tokens: int) -> None:
    """Logs a warning if the images have so few tokens that routing may make the model worse."""
    if tread and tokens < FEW_TOKENS:
        log.warning(
            "model.tread: images have %d tokens. Below %d tokens, routing can make images worse (docs/diffusion-algorithms.md). "
            "Remove model.tread, or use larger images",
            tokens, FEW_TOKENS,
        )  # fmt: skip
