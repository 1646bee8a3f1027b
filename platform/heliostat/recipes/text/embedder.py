"""Trains a text embedder contrastively, on matching pairs of texts.

    recipe: heliostat.recipes:Embedder
    model: {arch: bert, hidden_size: 256, ..., pooling: mean, temperature: 0.05, max_tokens: 256}
    model: {pretrained: /models/bge-small, ...}        # weights and tokenizer of a folder in Hugging Face's format

A sample is a row with a `query` and a `text` (`heliostat.pipelines:PairPipeline`). `heliostat.recipes.pairs` describes the loss
and the scores.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes import tokenizing
from heliostat.recipes.pairs import EmbedsPairs, PairKeys, named, present
from heliostat.recipes.protocol import Batch
from heliostat.schema import Float

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
BUILT_IN = {"Embedder": ("heliostat.recipes.text.encoder", "transformers")}


class EmbedderKeys(PairKeys):
    """Defines the keys of `model` that don't belong to the architecture."""

    pooling: Literal["mean", "last", "cls"] = "mean"
    """How the model pools the token states of a text into one vector: `mean` of all states, `last` state, or first state
    (`cls`)."""
    temperature: Float = Field(0.05, gt=0)
    """Temperature: divides the cosine similarities in the loss."""
    max_tokens: int = Field(256, ge=2)
    """Maximum tokens of a text; longer texts are truncated."""


OWN = tuple(EmbedderKeys.model_fields)


class Embedder(EmbedsPairs):
    sides = ("query", "text")  # columns of a row
    gathered = (*sides, "names")
    own = EmbedderKeys
    keys: EmbedderKeys

    @cached_property
    def config(self) -> PreTrainedConfig:
        from heliostat.recipes.text import model_config
        from heliostat.recipes.text.encoder import ENCODER

        keys = {k: v for k, v in self.job.model.items() if k not in OWN}
        if self.pretrained:
            config = model_config.applied(model_config.read(keys, ENCODER), model_config.changed(keys))
        else:
            config = model_config.from_keys(keys, ENCODER)
        longest = getattr(config, "max_position_embeddings", None)
        if longest and 0 < longest < self.keys.max_tokens:
            raise ConfigError(
                f"model.max_tokens: {self.keys.max_tokens} is above the model's max_position_embeddings. Use at most {longest}"
            )
        config.use_cache = False
        return config

    def probe(self) -> None:
        assert self.config

    def bind(self, sources: list[Manifest]) -> None:
        self.sources = sources
        if not self.pretrained:
            tokenizing.fit_vocabulary(self.config, "model.vocab_size", self.job.model.get("vocab_size"), self.tokenizer)

    @property
    def max_tokens(self) -> int:
        return self.keys.max_tokens

    def first(self) -> PreTrainedModel:
        from heliostat.recipes.text import encoder

        return encoder.build(self.config)

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: pa.Table, keys: np.ndarray) -> Batch:
        import torch

        batch_tensors: Batch = {}
        columns = {side: present(content, side) for side in self.sides}
        sides = {side: tokenizing.tokens(self.tokenizer, texts, self.keys.max_tokens) for side, texts in columns.items()}
        for side, tokens in sides.items():
            batch_tensors |= {f"{side}_ids": tokens.ids, f"{side}_mask": tokens.mask}
        cut = np.stack([tokens.cut for tokens in sides.values()], axis=1)
        return {**batch_tensors, "names": named([*columns.values()]), "cut": torch.from_numpy(cut).long()}

    def represent(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        from heliostat.recipes.text.encoder import embed

        sides = {side: embed(model, batch[f"{side}_ids"], batch[f"{side}_mask"], self.keys.pooling) for side in self.sides}
        return {**sides, "names": batch["names"], "cut": batch["cut"]}

    # for people, and the export --------------------------------------------------------------------------------------

    def describe(self, content: pa.Table) -> str:
        row = content.to_pylist()[0]
        return f"{row['query']} -> {row['text']}"

    def save_config(self, folder: Path) -> None:
        from heliostat.recipes.text import encoder, model_config, sentence_folder

        kind = encoder.model_class(self.config).__name__
        config = model_config.exported_config(self.config, kind, self.job.train.precision)
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        how = sentence_folder.Embedding(self.keys.pooling, self.keys.max_tokens)
        sentence_folder.write(folder, how, config.get_text_config().hidden_size)
