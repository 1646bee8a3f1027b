"""Shares between the two examples: a BERT from a job's keys or a folder, its tokenizer, its export, and answers to prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes.pretrained import from_config
from heliostat.recipes.protocol import Evaluates, Generated, Generates, Recipe, Request, Serves
from heliostat.schema import nearest
from heliostat.text import brief
from tokenizers import Tokenizer


class Bert(Recipe, Evaluates, Generates, Serves):
    auto: str  # of transformers' Auto classes
    architecture: str  # what an export's configuration names
    special: dict[str, str]  # tokens that the dataset's tokenizer may lack: they get the next ids

    def __init__(self, job: Job) -> None:
        self.pretrained, self.config = job.model.get("pretrained"), configuration(job.model)

    def bind(self, sources: list[Manifest]) -> None:
        self.source = sources[0]
        if any(source.meta.get("tokenizer") != self.source.fact("tokenizer") for source in sources):
            raise ConfigError("data.sources: the datasets were made with different tokenizers; prepare them with one")
        self.config.pad_token_id, size = self.tokenizer.pad_token_id, len(self.tokenizer)
        if not self.pretrained:
            self.config.vocab_size = -(-size // 64) * 64
        elif self.config.vocab_size < size:
            raise ConfigError(f"model.pretrained: has {self.config.vocab_size} tokens, and the dataset needs {size}")

    @cached_property
    def tokenizer(self) -> Any:
        raw = Tokenizer.from_str(self.source.file("tokenizer.json").read().decode())
        return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **self.special)

    def build(self) -> torch.nn.Module:
        if self.pretrained and torch.get_default_device().type != "meta":
            return self.load(Path(self.pretrained)).train()
        return from_config(getattr(transformers, self.auto), self.config).train()

    def save_config(self, folder: Path) -> None:
        self.config.architectures, self.config.dtype = [self.architecture], None  # the type is that of the weights
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> torch.nn.Module:
        return getattr(transformers, self.auto).from_pretrained(folder, dtype=torch.float32)

    @classmethod
    def generator(cls, folder: Path, options: dict[str, Any]) -> Callable[[list[Request]], list[Generated]]:
        if options:
            raise ConfigError(f"generate: a {cls.__name__} has no option {', '.join(options)}")
        model = getattr(transformers, cls.auto).from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

        @torch.no_grad()
        def answer(requests: list[Request]) -> list[Generated]:
            return [cls.answer(model, tokenizer, request.prompt) for request in requests]

        return answer

    @staticmethod
    @abstractmethod
    def answer(model: Any, tokenizer: Any, prompt: str) -> Generated:
        """Answers a prompt with an exported model."""


def configuration(model: dict[str, Any]) -> Any:
    """Builds the configuration from `pretrained: FOLDER`, or from keys of BertConfig; ConfigError for what makes no sense."""
    if "pretrained" in model:
        if not (Path(model["pretrained"]) / "config.json").is_file():
            raise ConfigError(f"model.pretrained: {model['pretrained']!r} isn't a model folder (no config.json)")
        return transformers.BertConfig.from_pretrained(model["pretrained"])
    known = sorted(transformers.BertConfig.__dataclass_fields__)
    for key in model:
        if key not in known:
            raise ConfigError(f"model.{key}: unknown key of BertConfig{nearest(key, known)}")
    try:
        made = transformers.BertConfig(**model)
        whole = made.hidden_size % made.num_attention_heads == 0
    except Exception as e:  # whatever transformers makes of a wrong value
        raise ConfigError(f"model: {brief((str(e).splitlines() or [type(e).__name__])[-1])}") from e
    if not whole:
        raise ConfigError(f"model.num_attention_heads: {made.num_attention_heads} doesn't divide hidden_size {made.hidden_size}")
    return made
