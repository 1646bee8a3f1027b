"""Trains a masked language model (Devlin et al. 2018, arXiv 1810.04805) on any dataset of tokens.

    recipe: jobs.examples.masked_lm:MaskedLM
    model: {hidden_size: 128, num_hidden_layers: 2, ...}      # keys of BertConfig; or {pretrained: FOLDER}

Of a sample's tokens 15 % are asked for: 80 % of them are replaced by [MASK], 10 % by another token. Which ones follows from the
sample's key, so they are the same on any number of workers, and the held-out samples' never change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.recipes.protocol import IGNORED, Batch, Generated, Loss

from jobs.examples.bert import Bert

ASKED, REPLACED, RANDOM = 0.15, 0.8, 0.1
MASK = "[MASK]"


class MaskedLM(Bert):
    kind = "tokens"
    scores = ("loss", "accuracy")
    prompts = (f"import {MASK}\n", f"def __init__({MASK}, name):")
    auto, architecture, special = "AutoModelForMaskedLM", "BertForMaskedLM", {"mask_token": MASK}

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if not job.data.sequence_length:
            raise ConfigError("data.sequence_length: is required for a language model")
        if job.data.sequence_length > self.config.max_position_embeddings:
            longest = self.config.max_position_embeddings
            raise ConfigError(f"data.sequence_length: {job.data.sequence_length} is above max_position_embeddings {longest}")
        self.seed = job.train.seed

    def batch(self, content: np.ndarray, keys: np.ndarray) -> Batch:
        tokens, mask = torch.from_numpy(np.ascontiguousarray(content)).long(), self.tokenizer.mask_token_id
        draws = [np.random.Generator(np.random.Philox(key=[self.seed, int(key)])) for key in keys]
        asked, how = (torch.from_numpy(np.stack([d.random(content.shape[1]) for d in draws])) for _ in range(2))
        other = torch.from_numpy(np.stack([d.integers(0, mask, content.shape[1]) for d in draws]))
        hidden = asked < ASKED
        hidden[torch.arange(len(tokens)), asked.argmin(dim=1)] = True  # every sample asks for something
        given = torch.where(how < REPLACED, mask, torch.where(how < REPLACED + RANDOM, other, tokens))
        return {"input_ids": torch.where(hidden, given, tokens), "labels": torch.where(hidden, tokens, IGNORED)}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        logits = model(input_ids=batch["input_ids"]).logits.float().flatten(0, 1)
        return Loss(F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"))

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits, labels = model(input_ids=batch["input_ids"]).logits.float(), batch["labels"]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        right = (logits.argmax(-1) == labels).float()
        return {"loss": losses.sum(1), "accuracy": right.sum(1), "terms": (labels != IGNORED).float().sum(1)}

    @staticmethod
    def answer(model: Any, tokenizer: Any, prompt: str) -> Generated:
        """Answers a prompt with the likeliest word for each [MASK]."""
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        likeliest = model(input_ids=ids).logits[..., : tokenizer.mask_token_id].argmax(-1)
        words = [tokenizer.decode(token) for token in likeliest[ids == tokenizer.mask_token_id]]
        return Generated(prompt, " ".join(map(repr, words)) or f"the prompt holds no {MASK}", {"words": words})
