"""Writes the files next to an exported language model's weights: configuration, tokenizer, and generation defaults. Chooses
prompts for demonstrating the model: the first words of held-out documents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from heliostat.config.spec import Job
from heliostat.data import content
from heliostat.data.content import Content
from heliostat.data.dataset import open_dataset, plan
from heliostat.data.manifest import Manifest
from heliostat.errors import DataError, StorageError
from heliostat.recipes.pretrained import from_folder
from heliostat.recipes.text import infilling, model_config, vocabulary


class ExportedChat(NamedTuple):
    """Describes how a model chats: the template of its prompts, and the tokens that end its answers."""

    template: str
    ends: list[int]


def write(
    folder: Path,
    as_pretrained: PreTrainedConfig,
    pretrained: str | None,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    sources: list[Manifest],
    precision: str,
    chat: ExportedChat | None = None,
) -> None:
    """Writes the files into the model's folder. Copies the tokenizer of a pretrained model; otherwise, `tokenizer` builds the
    tokenizer. `precision`: of the weights. `chat`: replaces the tokenizer's chat template, and adds to the tokens that end an
    answer."""
    config = model_config.exported_config(as_pretrained, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[as_pretrained.model_type], precision)
    config.use_cache = True
    config.save_pretrained(folder)
    generation = _generation(pretrained, config)
    saved = tokenizer_of(pretrained, tokenizer, chat)
    if chat:
        named = generation.eos_token_id
        before = named if isinstance(named, list) else [] if named is None else [named]
        generation.eos_token_id = sorted({*before, *chat.ends})
    generation.save_pretrained(folder)
    saved.save_pretrained(folder)
    if pretrained:
        (folder / "tokenizer.json").write_bytes(vocabulary.of_folder(Path(pretrained)))  # the original file, unchanged
    infilling.write(folder, sources)


def tokenizer_of(
    pretrained: str | None, tokenizer: Callable[[], PreTrainedTokenizerBase], chat: ExportedChat | None
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a pretrained model, or the result of `tokenizer`, with the chat template of `chat`."""
    own = from_folder("model.pretrained", AutoTokenizer, pretrained) if pretrained else tokenizer()
    if chat:
        own.chat_template = chat.template
    return own


def _generation(pretrained: str | None, config: PreTrainedConfig) -> GenerationConfig:
    """Returns the exported model's generation defaults and end tokens, from the pretrained folder or its config."""
    if pretrained and (Path(pretrained) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(pretrained)
    return GenerationConfig.from_model_config(config)


log = logging.getLogger("heliostat")

LOOKED_AT = 32  # samples to choose prompts from
TOKENS = 24  # tokens of a document's beginning
WORDS, LETTERS = 4, 40
PLAIN = "The"


def of_held_out(job: Job, sources: list[Manifest], tokenizer: Tokenizer, end: int) -> list[str]:
    """Chooses at most two prompts from the held-out documents of a job's datasets, or from training documents if nothing is held
    out."""
    try:
        samples = some(job, sources)
    except (DataError, StorageError, OSError) as e:
        log.warning("can't read the datasets, so the prompt is %r: %s", PLAIN, e)
        return [PLAIN]
    starts = [
        opening(tokenizer.decode(_beginning(tokens, end).tolist(), skip_special_tokens=True))
        for tokens in cast("np.ndarray", samples)
    ]
    return list(dict.fromkeys(filter(None, starts)))[:2] or [PLAIN]


def some(job: Job, sources: list[Manifest]) -> Content:
    """Reads at most LOOKED_AT held-out samples, or training samples if nothing is held out. Leaves out damaged samples. Raises
    DataError or StorageError if the datasets can't be read."""
    data = open_dataset(plan(job, sources))
    taken = data.order.held_out(LOOKED_AT) if job.evaluate else None
    if taken is None or not len(taken):
        taken = data.order.locate(data.order.step(0).ravel()[:LOOKED_AT])
    gathered = data.gather(taken)
    return content.take(gathered.content, np.setdiff1d(np.arange(len(gathered.content)), list(gathered.faults)))


def _beginning(tokens: np.ndarray, end: int) -> np.ndarray:
    """Returns the first tokens of the document that begins in a sample. If this document is too short, returns the first tokens
    of the sample."""
    ends = np.flatnonzero(tokens == end)
    begin = int(ends[0]) + 1 if len(ends) and int(ends[0]) + TOKENS < len(tokens) else 0
    return tokens[begin : begin + TOKENS]


def opening(text: str) -> str:
    """Returns the first words of the first line that has letters or digits. Leaves out the text's last word, because this word
    may be incomplete."""
    lines = text.replace("\ufffd", "").splitlines()
    number = next((i for i, line in enumerate(lines) if any(map(str.isalnum, line))), None)
    if number is None:
        return ""
    words = lines[number].split()
    whole = len(words) if number + 1 < len(lines) else max(1, len(words) - 1)
    return " ".join(words[: min(WORDS, whole)])[:LETTERS].strip()
