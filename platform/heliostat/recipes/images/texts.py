"""Resolves the text encoders of a text-to-image job: their settings, and the shapes of their embeddings.

A list of frozen text encoders is joined as the backbone's family does (`pipeline.join`). Settings that a job leaves out follow
from the family and from the type of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from heliostat.errors import ConfigError
from heliostat.recipes.images import config, text_encoders
from heliostat.recipes.images.backbones.family import Family
from heliostat.recipes.images.config import Text
from heliostat.recipes.images.pipeline import Encoded, join, padding_of


@dataclass(frozen=True)
class TextShape:
    """Describes what a frozen text encoder gives for a caption. `pooled`: the width of the pooled embedding; None without it."""

    tokens: int
    width: int
    pooled: int | None = None

    def blank(self, captions: int, device: str | torch.device = "meta") -> Encoded:
        """Returns zero embeddings of captions."""
        pooled = None if self.pooled is None else torch.zeros((captions, self.pooled), device=device)
        return Encoded(torch.zeros((captions, self.tokens, self.width), device=device), pooled)


class FrozenText:
    """Describes one frozen text encoder of a job. `number`: its place in the job's list, from 1. `several`: whether the list has
    more encoders. Reads the encoder's configuration when a property needs it."""

    def __init__(self, text: Text, family: Family, number: int, several: bool) -> None:
        self.text, self.folder, self._family, self._several = text, str(text.pretrained), family, several
        self.suffix = f"_{number}" if number > 1 else ""
        self.name = f"text_encoder{self.suffix}"
        self.key = f"model.text.{number - 1}" if several else "model.text"

    @cached_property
    def config(self) -> PreTrainedConfig:
        return config.text_config(self.folder)

    @property
    def clip(self) -> bool:
        return "clip" in self.config.model_type

    @property
    def layer(self) -> str:
        usual = ("penultimate" if self.clip else "last") if self._several else self._family.layer
        return self.text.layer or usual

    @property
    def padding(self) -> str:
        """Returns what the text encoder does with padding, as an argument of `pipeline.encode`."""
        return "zero" if self._chosen == "masked" else self._chosen

    @property
    def masked(self) -> bool:
        """Returns whether the backbone masks the padding of this encoder."""
        return self._chosen == "masked"

    @property
    def _chosen(self) -> str:
        usual = padding_of(self.config.model_type)
        if self._family.masked and usual != "seen":
            usual = "masked"
        return self.text.padding or ("seen" if self._several and usual == "kept" else usual)

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the arguments of `pipeline.encode`."""
        return {"pooling": self.text.pooling, "layer": self.layer, "padding": self.padding}

    @cached_property
    def shape(self) -> TextShape:
        width, pooled = text_encoders.widths(self.config)
        return TextShape(self.text.embeddings, width, pooled if self._several else None)


def frozen(texts: list[Text], family: Family) -> list[FrozenText]:
    """Lists a job's frozen text encoders; empty if the text encoder is trained."""
    several = len(texts) > 1
    return [FrozenText(text, family, number, several) for number, text in enumerate(texts, start=1) if text.pretrained]


def joined(parts: list[FrozenText], family: Family) -> TextShape:
    """Returns the shape of the joined embeddings. Raises ConfigError if the family can't join these text encoders, or can't mask
    padding."""
    if len(parts) > 1:
        _check(parts, family)
    if not family.masks and (part := next((part for part in parts if part.masked), None)):
        raise ConfigError(f"{part.key}.padding: {family.cls.__name__} can't mask padding ('masked'). Use seen, kept, or zero")
    tokens, pooled = join(family.cls.__name__, [part.shape.blank(1) for part in parts])
    return TextShape(tokens.shape[1], tokens.shape[2], None if pooled is None else pooled.shape[1])


def _check(parts: list[FrozenText], family: Family) -> None:
    clips, others = [part for part in parts if part.clip], [part for part in parts if not part.clip]
    needed = {
        "clips": ("CLIP encoders only", not others),
        "clips+text": ("CLIP encoders, and at most one other encoder", bool(clips) and len(others) < 2),
        "clip|text": ("CLIP encoders for the pooled embedding, and another encoder for the tokens", bool(clips and others)),
        "": ("one text encoder", False),
    }
    wanted, fits = needed[family.joins]
    if not fits:
        kinds = ", ".join(part.config.model_type for part in parts)
        raise ConfigError(f"model.text: {family.cls.__name__} takes {wanted} (given: {kinds}). Change this list")
    if family.joins != "clip|text" and len({part.shape.tokens for part in clips}) > 1:
        raise ConfigError(f"{clips[1].key}.length: CLIP encoders need the same length. Set it to {clips[0].text.length}")
    kept = next((part for part in clips if part.padding != "zero"), None)
    if family.joins == "clips" and kept and (masked := next((part for part in clips if part.masked), None)):
        raise ConfigError(
            f"{masked.key}.padding: CLIP encoders share the positions of tokens, so the padding that {kept.key} keeps can't be "
            f"masked (masked here, {kept.padding} there). Set the same padding for all CLIP encoders"
        )
    if family.joins == "clips+text" and others and sum(part.shape.width for part in clips) > others[0].shape.width:
        raise ConfigError(
            f"{others[0].key}: has width {others[0].shape.width}, less than the CLIP encoders together "
            f"({sum(part.shape.width for part in clips)}). Use a wider text encoder"
        )
