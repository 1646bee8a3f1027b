"""Trains embedders contrastively on matching pairs. The text embedder and the image embedder share this code.

The negatives of a pair are all other pairs of the step, on all workers (`CouplesSamples`). Pairs with the same query or the same
match are excluded (`contrastive`).

Held-out scores: the loss over all held-out pairs together, recall at 1, 5, and 10, and the mean reciprocal rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import xxhash

from heliostat.config.spec import Job
from heliostat.errors import ConfigError, DataError
from heliostat.recipes import tokenizing
from heliostat.recipes.protocol import CouplesSamples, Evaluates, Exports, Loss, Part
from heliostat.schema import Float, Strict, validate_key

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from heliostat.data.manifest import Manifest
    from heliostat.recipes.protocol import Batch

SCORES = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")


class PairKeys(Strict):
    """Defines the keys of `model` that every embedder has, and that don't belong to the architecture."""

    temperature: Float
    """Temperature: divides the cosine similarities in the loss."""


K = TypeVar("K", bound=PairKeys)


class EmbedsPairs(CouplesSamples, Evaluates, Exports):
    """Represents each sample as two embeddings of length 1: the query and its match. `sides` contains the names of the two
    embeddings.

    `represent` also returns `names` and `cut`. `names`: int64 [batch, 2], ids of the query and the match; equal texts or images
    have equal ids. `cut`: whether a text was truncated.
    """

    kind = "rows"
    sides: tuple[str, str]
    sources: list[Manifest]
    keys: PairKeys
    own: type[PairKeys]  # the keys of `model` that don't belong to the architecture
    scores: tuple[str, ...] = ("loss", *SCORES)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.data.sequence_length:
            raise ConfigError("data.sequence_length: only for token datasets. Remove this key, and set model.max_tokens")
        if job.train.global_batch_size < 2:
            raise ConfigError(
                "train.global_batch_size: a batch of 1 pair has no other pair to compare with. Set this key to 2 or more"
            )
        if "init" in job.model:
            raise ConfigError("model.init: only for language models. Remove this key")
        self.keys = _own_keys(self.own, job.model)
        self.temperature: float = self.keys.temperature  # divides the cosine similarities in the loss
        self.pretrained: str | None = job.model.get("pretrained")

    @property
    @abstractmethod
    def config(self) -> PreTrainedConfig:
        """Makes the model's configuration, which needs transformers. Raises ConfigError for invalid keys."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Returns the maximum number of tokens per text."""

    @abstractmethod
    def first(self) -> PreTrainedModel:
        """Builds the embedding model with initial weights."""

    def whole(self, folder: str) -> PreTrainedModel:
        """Loads the pretrained model."""
        import torch

        from heliostat.recipes.text import encoder

        return encoder.load("model.pretrained", folder, config=self.config, dtype=torch.float32)

    def build(self) -> PreTrainedModel:
        import torch

        from heliostat.recipes import weightless
        from heliostat.recipes.text import checkpointing

        if self.pretrained and torch.get_default_device().type != "meta" and not weightless.wanted():
            model = self.whole(self.pretrained)
        else:
            model = self.first()
            if self.pretrained:
                weightless.comes_from(model, self.pretrained)
        if self.job.train.activation_checkpointing:
            checkpointing.use(model, True, False)
        return model.train()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the pretrained model's tokenizer, or the datasets' tokenizer."""
        if self.pretrained:
            return tokenizing.of_folder(self.pretrained)
        return tokenizing.of_datasets(self.sources, self.max_tokens)

    def load(self, folder: Path) -> PreTrainedModel:
        from heliostat.recipes.text import encoder

        return encoder.load("model", folder)

    @classmethod
    def exported(cls, folder: Path, model: dict[str, object]) -> dict[str, object]:
        return {"pretrained": str(folder), **{key: model[key] for key in cls.own.model_fields if key in model}}

    def couple(self, vectors: dict[str, torch.Tensor]) -> Loss:
        return self._coupled(vectors, None)

    def couple_some(self, vectors: dict[str, torch.Tensor], some: slice) -> Loss:
        return self._coupled(vectors, some)

    def _coupled(self, vectors: dict[str, torch.Tensor], some: slice | None) -> Loss:
        from heliostat.recipes.contrastive import contrast

        asking, queries = self.sides
        losses, pairs, cut = (
            contrast(vectors[asking], vectors[queries], vectors["names"], self.temperature, some),
            len(vectors["names"]),
            vectors["cut"],
        )
        was_cut = cut.float().mean() if some is None else cut[some].float().sum() / cut.numel()
        parts = {"accuracy": losses.right / pairs, "masked": losses.masked, "cut": was_cut}
        return Loss(losses.loss, {name: Part(value) for name, value in parts.items()})

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        vectors = self.represent(model, self.complete(batch))
        return {name: vectors[name] for name in self.gathered}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {}

    def measure(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        import torch

        from heliostat.recipes import contrastive

        asking, queries_of, names = (arrays[name] for name in (*self.sides, "names"))
        queries, documents, same = (torch.from_numpy(array) for array in (asking, queries_of, names))
        blocks = contrastive.blocks(len(names))
        parts = [contrastive.contrast(queries, documents, same, self.temperature, some) for some in blocks]
        loss = sum(float(one.loss) for one in parts) / len(names)
        return {"loss": loss, **contrastive.recall(contrastive.ranks(asking, queries_of, names))}


def _own_keys(kind: type[K], model: dict[str, object]) -> K:
    """Reads the keys of a job's `model` that don't belong to the architecture. Raises ConfigError for invalid values."""
    return validate_key(kind, {k: v for k, v in model.items() if k in kind.model_fields}, "model")


def present(content: pa.Table, column: str) -> list[Any]:
    """Returns a column's values. Raises DataError if a value is missing."""
    if nulls := content[column].null_count:
        raise DataError(f"{nulls} of {len(content)} rows of a batch have no {column!r}. Remove these rows from the dataset")
    return content[column].to_pylist()


def named(sides: Sequence[Sequence[str | bytes]]) -> torch.Tensor:
    """Makes the ids of each sample's two sides (query and match), int64 [samples, 2]. `sides`: the texts or bytes of each side.
    Equal texts or bytes have equal ids."""
    import torch

    return torch.tensor([[_number(value) for value in side] for side in sides]).T.contiguous()


def _number(value: str | bytes) -> int:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return xxhash.xxh64_intdigest(data) - (1 << 63)
