"""Trains a classifier of texts of varying length: rows with a `text` and a `label`.

    recipe: jobs.examples.classifier:Classifier
    model: {hidden_size: 128, max_position_embeddings: 256, ...}      # keys of BertConfig; or {pretrained: FOLDER}

Texts are padded to the longest of their batch, and cut at `max_position_embeddings`: `train/padding` and `train/cut` are the
shares of places and of texts. Accuracy and macro-averaged F1 are of all held-out samples together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes.batches import pad
from heliostat.recipes.protocol import Batch, Generated, Loss, Part

from jobs.examples.bert import Bert


class Classifier(Bert):
    kind = "rows"
    terms_per_sample = 1
    scores = ("loss", "accuracy", "macro_f1")
    gathered = ("label", "predicted")
    prompts = ("def loads(text): return decode(text)", "def send(sock, data): sock.sendall(data)")
    auto, architecture = "AutoModelForSequenceClassification", "BertForSequenceClassification"
    special = {"pad_token": "<pad>"}

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.data.sequence_length:
            raise ConfigError("data.sequence_length: rows have none; remove it")

    def bind(self, sources: list[Manifest]) -> None:
        super().bind(sources)
        classes = sorted({name for source in sources for name in source.fact("classes")})
        if not self.pretrained:
            self.config.id2label = dict(enumerate(classes))
            self.config.label2id = {name: number for number, name in enumerate(classes)}
        elif unknown := sorted(set(classes) - set(self.config.label2id)):
            raise ConfigError(f"model.pretrained: does not know the label {unknown[0]!r} of data.sources")

    def batch(self, content: pa.Table, keys: np.ndarray) -> Batch:
        rows = self.tokenizer(content["text"].to_pylist(), verbose=False)["input_ids"]
        longest = self.config.max_position_embeddings
        padded = pad(rows, self.tokenizer.pad_token_id, longest)
        labels = torch.tensor([self.config.label2id.get(label, 0) for label in content["label"].to_pylist()])
        cut = torch.tensor([len(row) > longest for row in rows])
        return {"input_ids": padded.values, "attention_mask": padded.mask.long(), "labels": labels, "cut": cut}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        padding, cut = 1 - batch["attention_mask"].float().mean(), batch["cut"].float().mean()
        summed = F.cross_entropy(_logits(model, batch), batch["labels"], reduction="sum")
        return Loss(summed, {"padding": Part(padding), "cut": Part(cut)})

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits, label = _logits(model, batch), batch["labels"]
        losses = F.cross_entropy(logits, label, reduction="none")
        return {"loss": losses, "terms": torch.ones_like(losses), "label": label, "predicted": logits.argmax(1)}

    def measure(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        label, predicted = arrays["label"], arrays["predicted"]
        there = np.unique(np.concatenate([label, predicted]))
        f1 = [2 * np.sum((label == c) & (predicted == c)) / (np.sum(label == c) + np.sum(predicted == c)) for c in there]
        return {"accuracy": float(np.mean(label == predicted)), "macro_f1": float(np.mean(f1))}

    @staticmethod
    def answer(model: Any, tokenizer: Any, prompt: str) -> Generated:
        """Answers a prompt with its likeliest label."""
        padded = pad(tokenizer([prompt])["input_ids"], tokenizer.pad_token_id, model.config.max_position_embeddings)
        chances = model(input_ids=padded.values, attention_mask=padded.mask.long()).logits.softmax(-1)[0]
        label = model.config.id2label[int(chances.argmax())]
        return Generated(prompt, label, {"label": label, "probability": float(chances.max())})


def _logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
