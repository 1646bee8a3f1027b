"""Loads an exported language model, and continues prompts with this model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heliostat.errors import ConfigError
from heliostat.recipes import pretrained
from heliostat.recipes.protocol import Generated, Request
from heliostat.recipes.text import chat, infilling
from heliostat.recipes.text.infilling import Infilling
from heliostat.schema import Float, Strict, validate

EMPTY = "is empty, and the tokenizer has no beginning-of-document token"


def whole(key: str, folder: str | Path, **options: object) -> PreTrainedModel:
    """Loads the language model in a folder. Raises ConfigError if a weight is missing."""
    return pretrained.whole(key, transformers.AutoModelForCausalLM, folder, **options)


def ends(tokenizer: PreTrainedTokenizerBase, config: object) -> list[int]:
    """Returns the tokens that end an answer: those of the tokenizer, and those in the model's generation config."""
    named = getattr(config, "eos_token_id", None)
    tokens = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({token for token in tokens if token is not None})


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the tokens of a prompt. An empty prompt becomes the beginning-of-document token, or no token if the tokenizer
    has none."""
    return tokenizer(text or tokenizer.bos_token or "", verbose=False)["input_ids"]


class Sampling(Strict):
    """Describes the sampling options. Temperature 0 always takes the most likely token."""

    max_tokens: int = Field(100, ge=1)
    temperature: Float = Field(0.8, ge=0)
    top_p: Float = Field(0.95, gt=0, le=1)


class Writing(Sampling):
    """Describes the text to generate. With a suffix, the model generates the text between the prompt and the suffix. `chat`:
    whether the prompt is a message of the user, which the chat template renders. Unset: if the model has a template, and there is
    no suffix."""

    suffix: str | None = None
    chat: bool | None = None


class TextGenerator:
    """Continues or answers prompts with an exported model, or fills in the text before a suffix."""

    def __init__(self, folder: Path, options: Mapping[str, object]) -> None:
        settings = validate(Writing, options, "generate")
        self.suffix, self.options = settings.suffix, settings.model_dump(exclude={"suffix", "chat"})
        self.tokenizer = pretrained.from_folder("model", transformers.AutoTokenizer, folder)
        self.chat = self._chats(settings, folder)
        self.infilling = Infilling.of(self.tokenizer) if self.suffix is not None else None
        if self.suffix is not None and self.infilling is None:
            raise ConfigError(f"suffix: {infilling.NONE} ({folder}). Remove the suffix, or use another model")
        from heliostat.recipes.text.server import take_sampling  # imports mlflow

        model = whole("model", folder)
        self.ends = take_sampling(model)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, requests: list[Request]) -> list[Generated]:
        return [self._answered(one) for one in requests]

    def _chats(self, settings: Writing, folder: Path) -> bool:
        """Returns whether the chat template renders prompts. Raises ConfigError if the options contradict this."""
        if settings.chat and settings.suffix is not None:
            raise ConfigError("chat: has no effect with a suffix. Remove one of these options")
        if settings.chat and self.tokenizer.chat_template is None:
            raise ConfigError(f"chat: the model has no chat template ({folder}). Remove this option")
        unset = self.tokenizer.chat_template is not None and settings.suffix is None
        return unset if settings.chat is None else settings.chat

    def _answered(self, request: Request) -> Generated:
        """Generates the text after a prompt, or the answer to a message. With a suffix, generates the text between the prompt and
        the suffix."""
        from heliostat.recipes.text.server import continue_tokens  # imports mlflow

        if self.infilling is not None and self.suffix is not None:
            tokens, ends = self.infilling.prompt(request.prompt, self.suffix), [*self.ends, *self.infilling.ends]
        else:
            message = [{"role": "user", "content": request.prompt}]
            rendered = chat.encode(self.tokenizer, message) if self.chat else prompt_tokens(self.tokenizer, request.prompt)
            tokens, ends = rendered, self.ends
            if not tokens:
                raise ConfigError(f"prompt: {EMPTY}. Pass a prompt of at least one character")
        text = continue_tokens(self.model, self.tokenizer, tokens, **self.options, seed=request.seed, ends=ends)
        facts = {"text": text} if self.suffix is None else {"text": text, "suffix": self.suffix}
        return Generated(request.prompt, text if self.chat else request.prompt + text + (self.suffix or ""), facts)
