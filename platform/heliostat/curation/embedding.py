"""Embeds texts with the model in a Hugging Face folder: an embedder (transformers or sentence-transformers), or a language model.

The folder defines how the last hidden states become one vector (`heliostat.recipes.text.sentence_folder`). By default, the vector
is the mean of the hidden states across the tokens. Each vector is scaled by its largest number and rounded to 8 bits. So dot
products of two vectors are integers, and are the same on every machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from heliostat.curation.scoring import Reader, describe, digests
from heliostat.errors import ConfigError, naming
from heliostat.recipes.text import sentence_folder
from heliostat.tasks import files

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def pooling(folder: str) -> str:
    """Returns the folder's pooling of hidden states: `mean`, `cls`, or `last`. ConfigError for any other pooling."""
    with naming("model"):
        how = sentence_folder.read(Path(folder))
    return how.pooling if how else "mean"


def identity(folder: str) -> dict[str, str]:
    place = Path(folder)
    with naming("model"):
        configurations = [place / sentence_folder.MODULES, sentence_folder.pooling_file(place)]
    return digests(folder) | {str(p.relative_to(place)): files.digest("model", str(p)) for p in configurations if p.is_file()}


class TextEmbedder(Reader[np.ndarray]):
    """Embeds texts as int8 vectors. The vector of a text without tokens is all zeros."""

    def __init__(self, folder: str, max_tokens: int, batch: int) -> None:
        describe(folder)
        self.pooling, self.folder = pooling(folder), folder
        super().__init__(folder, "a text encoder", max_tokens, batch)

    def load(self, folder: str, **options: Any) -> PreTrainedModel:
        from heliostat.recipes.text import encoder

        return encoder.load("model", folder, **options)

    def values(self, output: Any, ids: Tensor, mask: Tensor) -> list[np.ndarray]:
        from heliostat.recipes.text import encoder

        vectors = encoder.pool(output.last_hidden_state.float(), mask, self.pooling).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise ConfigError(f"model: {self.folder!r} returns vectors that aren't finite. Use another model")
        return list(rounded(vectors))


def rounded(vectors: np.ndarray) -> np.ndarray:
    """Scales each vector so that its largest absolute number is 127, and rounds the numbers to int8. Returns int8 [vectors,
    dimensions]."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    scale = np.divide(127.0, largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(vectors * scale).astype(np.int8)
