"""Trains a language model on conversations (supervised fine-tuning): the model learns to write the assistant's turns.

    recipe: heliostat.recipes:SFT
    model: {pretrained: models/smollm2}                          # all weights
    model: {pretrained: models/smollm2, adapter: {rank: 16}}     # only an adapter (`recipes.adapters`)

A sample is a pack of conversations (`heliostat.pipelines:ConversationPipeline`). The conversations of a pack don't see each
other. The loss of a step is the sum over the trained tokens of the global batch, divided by their number. So the loss doesn't
depend on the number of workers, the micro-batches, and the packing.

Held-out scores: loss (nats per trained token), perplexity, and accuracy, the share of trained tokens that the model predicts. At
each evaluation, the model also answers fixed prompts (`model.samples`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes.auditing import Audits, MaskAudit
from heliostat.recipes.protocol import IGNORED, Batch
from heliostat.recipes.text.conversations import LearnsConversations

if TYPE_CHECKING:
    import torch

    from heliostat.recipes.text.answers import TokenPrompt
BUILT_IN = {"SFT": ("transformers",)}


class SFT(LearnsConversations, Audits):
    form = "packs"
    pipeline = "heliostat.pipelines:ConversationPipeline"
    scores = ("loss", "perplexity", "accuracy")

    def bind(self, sources: list[Manifest]) -> None:
        super().bind(sources)
        if self.document_mask:
            return
        for number, (facts, source) in enumerate(zip(self.facts, sources, strict=True)):
            if facts["counts"]["conversations"] > source.rows:
                raise ConfigError(
                    f"data.document_mask: false, but the packs of data.sources.{number}.path {str(source.location)!r} contain "
                    "several conversations, which would see each other. Set this key to true, or prepare the dataset with "
                    "packing: none"
                )

    def audit(self) -> MaskAudit:
        from heliostat.recipes.text import mask_audit

        return mask_audit.audit(self.sources, self.facts, self.raw_tokenizer)

    def trained(self, batch: Batch) -> torch.Tensor:
        from heliostat.recipes.text import next_token

        return (next_token.targets(batch) != IGNORED).sum(1)

    def presume(self, rows: int) -> pa.Table:
        from heliostat.recipes.text import packs

        return packs.placeholder(rows, self.length)

    def rows(self, content: pa.Table) -> Batch:
        from heliostat.recipes.text import next_token, packs

        train = self.job.train
        fixed = bool(train.compile) or train.parallel.sequence > 1
        padded = packs.batch(content, self.length, self.end, self.sources[0].fact("vocab_size"), self.document_mask, fixed)
        return padded if fixed else next_token.with_places(padded)

    def prompts_of(self, content: pa.Table) -> Iterator[TokenPrompt]:
        from heliostat.recipes.text import packs
        from heliostat.recipes.text.answers import TokenPrompt

        for conversation in packs.conversations(content):
            trained = np.append(conversation.trained, False)
            if (first := int(trained.argmax())) > 0:
                stop = first + int((~trained[first:]).argmax())
                yield TokenPrompt(conversation.tokens[:first].tolist(), conversation.tokens[first:stop].tolist())

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        from heliostat.recipes.text import next_token

        return next_token.accuracy(model, batch, self.tiled)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss, right = (sums[name] / max(1.0, sums["tokens"]) for name in ("nats", "right"))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": right}

    def describe(self, content: pa.Table) -> str:
        return self.raw_tokenizer.decode(content["tokens"][0].as_py(), skip_special_tokens=False)
