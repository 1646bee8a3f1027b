"""Classifies texts with a Hugging Face folder of a sequence classifier."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from heliostat.inference.batch.engines import Answer, Engine, Input, Loaded


class Classify(Engine):
    """Gives each text its likeliest label, and the probabilities of all; one that is longer than the model takes is cut, with
    `truncated` true. Where labels do not exclude each other, each has a probability of its own."""

    def __init__(self, folder: Path, batch: int) -> None:
        super().__init__(Loaded(folder, transformers.AutoModelForSequenceClassification), batch)
        config = self.model.config
        self.labels = [config.id2label[i] for i in range(config.num_labels)]
        self.independent = config.problem_type == "multi_label_classification"
        last = getattr(config, "summary_type", "") == "last"  # XLNet reads the last place, whatever stands there
        self.mixes = config.get_text_config().pad_token_id is not None and not last

    def apart(self, one: int, other: int) -> bool:
        return not self.mixes and one != other

    def refusal(self, tokens: list[int]) -> Answer | None:
        return None if tokens else Answer(bad="empty", detail="no token")

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        cut = [self.loaded.seen(row, one.text) for row, one in zip(tokens, inputs, strict=True)]
        ids, mask = self.padded(cut, left=False)
        logits = self.model(input_ids=ids, attention_mask=mask).logits.double()
        found = (logits.sigmoid() if self.independent else torch.softmax(logits, -1)).tolist()
        return [
            self._read(shares, len(short), len(short) < len(row)) for shares, short, row in zip(found, cut, tokens, strict=True)
        ]

    def _read(self, shares: list[float], tokens: int, truncated: bool) -> Answer:
        best = max(range(len(shares)), key=shares.__getitem__)
        told = {"label": self.labels[best], "probability": shares[best], "probabilities": shares}
        return Answer({**told, "tokens": tokens, "truncated": truncated})
