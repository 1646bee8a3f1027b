"""Lets a language model answer fixed prompts greedily: at each evaluation (`AnswerGallery`), and to demonstrate an export.

An answer ends at a token that ends the assistant's turns, or after `max_tokens`. All workers compute the same number of forward
passes, because ZeRO-3's all-gathers are collective.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from transformers import GenerationConfig

from heliostat.errors import ConfigError
from heliostat.recipes.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "answers.json"


class TokenPrompt(NamedTuple):
    """Contains a prompt up to the start of the answer, and the dataset's own answer (`wanted`; empty if there is none), both as
    token ids."""

    tokens: list[int]
    wanted: list[int]


class AnsweringRecipe(Protocol):
    """Lists the attributes of a recipe whose model answers prompts."""

    @property
    def answered(self) -> Sequence[TokenPrompt]: ...
    @property
    def max_answer(self) -> int: ...
    @property
    def ends(self) -> list[int]: ...
    @property
    def raw_tokenizer(self) -> Tokenizer: ...


class AnswerGallery:
    """Answers a recipe's prompts after every evaluation. Prompt number i is picture number i of the protocol `Gallery`: an array
    of the answer's tokens, int64."""

    def __init__(self, recipe: AnsweringRecipe) -> None:
        self.recipe, self.count = recipe, len(recipe.answered)

    def draw(self, model: torch.nn.Module, device: torch.device | str, numbers: list[int]) -> list[np.ndarray]:
        prompts = [self.recipe.answered[number].tokens for number in numbers]
        return write(model, device, prompts, self.recipe.ends, self.recipe.max_answer)

    def judge(
        self, pictures: list[np.ndarray], progressed: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], dict[str, bytes]]:
        """Returns no scores, and the answers as a JSON file: `prompt`, `answer`, `wanted`, `tokens`, and `finished` of each."""
        texts, ends = self.recipe.raw_tokenizer, set(self.recipe.ends)
        rows = [
            {
                "prompt": texts.decode(prompt.tokens, skip_special_tokens=False),
                "answer": texts.decode(tokens.tolist()),
                "wanted": texts.decode(prompt.wanted),
                "tokens": len(tokens),
                "finished": bool(len(tokens)) and int(tokens[-1]) in ends,
            }
            for prompt, tokens in zip(self.recipe.answered, pictures, strict=True)
        ]
        return {}, {FILE: json.dumps(rows, ensure_ascii=False, indent=1).encode()}


@torch.no_grad()
def write(
    model: torch.nn.Module, device: torch.device | str, prompts: list[list[int]], ends: list[int], max_tokens: int
) -> list[np.ndarray]:
    """Answers prompts greedily, in one batch. Returns the tokens of each answer, including the end token if the answer has one.

    If torch.distributed is initialized, all workers call this function together.
    """
    module: Any = getattr(model, "module", model)
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), ends[0]), torch.zeros((len(prompts), width), dtype=torch.long)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    together = dist.is_initialized() and dist.get_world_size() > 1
    how = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0], use_cache=True)
    with _own_settings(module), torch.compiler.set_stance("force_eager"):
        written = module.generate(ids.to(device), attention_mask=mask.to(device), generation_config=how, synced_gpus=together)
    return [_ended(row, ends) for row in written[:, width:].cpu().numpy()]


def _ended(tokens: np.ndarray, ends: list[int]) -> np.ndarray:
    """Removes the padding after the first end token."""
    last = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: last[0] + 1] if len(last) else tokens


@contextmanager
def _own_settings(module: Any) -> Iterator[None]:
    """Hides the sampling settings of a pretrained model, such as penalties."""
    before, module.generation_config = module.generation_config, GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = before


def asked(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[TokenPrompt]:
    """Renders user messages with a tokenizer's chat template. Raises ConfigError if the template rejects a message."""
    prompts = []
    for number, text in enumerate(questions):
        try:
            prompts.append(TokenPrompt(chat.encode(tokenizer, [{"role": "user", "content": text}]), []))
        except ConfigError as e:
            raise ConfigError(f"model.samples.prompts.{number}: {e}") from e
    return prompts
