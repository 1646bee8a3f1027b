"""Combines what a text-to-image model uses only in training: token routing (`model.tread`) and alignment (`model.repa`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from heliostat.errors import ConfigError
from heliostat.recipes.images import alignment, token_routing
from heliostat.recipes.images.alignment import Projector, Repa
from heliostat.recipes.images.blocks import BlockOutput
from heliostat.recipes.images.stored_features import FeatureFormat
from heliostat.recipes.images.token_routing import KeyedRouter, Tread
from heliostat.recipes.protocol import Batch

ASSUMED_CHANNELS = 768  # of features, for plans without datasets


class AidedModel(Protocol):
    """Describes the keys of `model:` that this module reads."""

    @property
    def repa(self) -> Repa | None: ...
    @property
    def tread(self) -> Tread | None: ...


@dataclass(frozen=True)
class TrainingAids:
    """Holds the aids of one model, which are None if the job doesn't use them."""

    router: KeyedRouter | None = None
    projector: Projector | None = None
    output: BlockOutput | None = None

    @classmethod
    def of(cls, model: AidedModel, backbone: Any, seed: int, channels: int) -> TrainingAids:
        """Builds the aids for a backbone. `channels`: of the stored features; 0 if the datasets aren't known."""
        token_routing.require_apart(model.tread, model.repa.layer if model.repa else None)
        router = KeyedRouter(model.tread, backbone, seed) if model.tread else None
        if not model.repa:
            return cls(router)
        return cls(router, *alignment.projector(model.repa, backbone, channels or ASSUMED_CHANNELS))

    def begin(self, keys: torch.Tensor | None, features: torch.Tensor | None) -> None:
        """Prepares a forward pass. Without `keys`, no token skips a block. With `features`, reads the block's output."""
        if self.router:
            self.router.keys = keys
        if self.output and features is not None:
            self.output.begin()

    def hidden(self, size: torch.Size) -> torch.Tensor:
        """Returns the block's output after a forward pass, [n, height, width, channels]. `size`: of the backbone's input."""
        assert self.output
        return self.output.take(size)


def require(model: AidedModel, features: FeatureFormat | None, tokens: int) -> None:
    """Raises ConfigError if `model.repa` needs features that the datasets don't have. Warns if images have too few `tokens` for
    `model.tread`."""
    token_routing.note_few_tokens(model.tread, tokens)
    if model.repa and features is None:
        raise ConfigError(
            "model.repa: the datasets have no features of an image model. Prepare them with latents.features, or remove this key"
        )


def require_uncompiled(model: AidedModel, compiled: bool) -> None:
    """Raises ConfigError if hooks on blocks would be compiled."""
    for name, aid in (("tread", model.tread), ("repa", model.repa)):
        if aid and compiled:
            raise ConfigError(f"model.{name}: not supported with train.compile. Set train.compile to false, or remove this key")


def arguments(model: AidedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Returns the aids' arguments of the forward pass of a completed batch."""
    routed = {"keys": batch["key"]} if model.tread else {}
    return routed | {name: batch[name] for name in ("features",) if name in batch}


def blank(model: AidedModel, features: FeatureFormat | None) -> dict[str, torch.Tensor]:
    """Makes the aids' arguments of a forward pass of one sample, to count its operations."""
    rows, columns, channels = (*features.grid, features.channels) if features else (16, 16, ASSUMED_CHANNELS)
    aligned = {"features": torch.zeros(1, rows, columns, channels)} if model.repa else {}
    return arguments(model, {"key": torch.zeros(1, dtype=torch.long), **aligned})
