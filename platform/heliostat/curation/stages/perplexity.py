"""Drops documents with a low or high perplexity under a language model, and assigns the other documents to buckets by perplexity.

CCNet (Wenzek et al. 2020, arXiv 1911.00359) sorts pages into head, middle, and tail by their perplexity under a 5-gram model of
Wikipedia. Here, `model` is a local folder of a causal language model, for example a heliostat export, with safetensors and
tokenizer.json. heliostat never runs code from this folder. Text like the model's training data has a low perplexity, and
repetitive text has a very low perplexity. Lists, noise, and other languages have a high perplexity.

The perplexity is exp(mean negative log probability) over the first `max_tokens` tokens, without the very first token. The stage
counts documents with more tokens. If the cluster has GPUs, each GPU has an actor with the model; otherwise the stage runs on
CPUs. The perplexity doesn't depend on the batch, but its last digits differ between devices.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

from pydantic import Field, model_validator

from heliostat.curation import scoring
from heliostat.curation.stage import Document, Outcome, text_of
from heliostat.errors import ConfigError
from heliostat.schema import Float


class Perplexity(scoring.ModelStage):
    gpu: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {"too_short": "fewer than two tokens, which have no perplexity"}
    limits: ClassVar = {
        "low_perplexity": ("perplexity", "min_perplexity", "a perplexity below {}"),
        "high_perplexity": ("perplexity", "max_perplexity", "a perplexity above {}"),
    }

    min_perplexity: Float | None = Field(None, ge=1)
    """Minimum perplexity; documents with a lower perplexity are dropped (`low_perplexity`)."""
    max_perplexity: Float | None = Field(None, ge=1)
    """Maximum perplexity; documents with a higher perplexity are dropped (`high_perplexity`)."""
    buckets: list[Float] = []
    """Upper bounds of the buckets, ascending, such as [340, 900]: the column `bucket` is 0 below the first bound, 1 below
    the second bound, and so on."""
    max_tokens: int = Field(512, ge=8)
    """Maximum tokens of a document that the model reads."""
    batch: int = Field(4, ge=1, le=1024)
    """Batch size: documents of similar length that the model reads together. Each token of the batch needs memory for one number
    per token of the vocabulary."""
    column: str = Field("perplexity", min_length=1)
    """Name of the column in which the stage stores the perplexity."""
    bucket_column: str = Field("bucket", min_length=1)
    """Name of the column in which the stage stores the bucket."""

    @model_validator(mode="after")
    def _one(self) -> Perplexity:
        if self.min_perplexity is None and self.max_perplexity is None and not self.buckets:
            raise ValueError("no bound is set. Set min_perplexity, max_perplexity, or buckets")
        if any(low >= high for low, high in pairwise(self.buckets)):
            raise ValueError(
                f"buckets: {self.buckets} must ascend, without repeated values. Sort the bounds, and remove repeated bounds"
            )
        if self.column == self.bucket_column:
            raise ValueError(f"bucket_column: {self.column!r} is the column of the perplexity. Set bucket_column to another name")
        return self

    def check(self) -> None:
        config = scoring.describe(self.model)
        named = config.get("architectures") or ["none"]
        if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named):
            raise ConfigError(
                f"model: {self.model!r} is a {', '.join(named)}, not a causal language model. Use a causal language model"
            )
        scoring.check_length(config, self.max_tokens)

    def computing(self) -> Callable[[list[Document]], list[tuple[float | None, bool]]]:
        likelihood = scoring.Likelihood(self.model, self.max_tokens, self.batch)
        return lambda documents: likelihood([text_of(d) for d in documents])

    def outcome(self, document: Document, nats: float | None, cut: bool) -> Outcome:
        counts = {"cut_to_max_tokens": 1} if cut else {}
        if nats is None:
            return Outcome(None, "too_short", counts=counts)
        perplexity = round(math.exp(min(nats, 700.0)), 4)
        bucket = {self.bucket_column: bisect_right(self.buckets, perplexity)} if self.buckets else {}
        return self.judged(document, {"perplexity": perplexity}, counts, {self.column: perplexity, **bucket})
