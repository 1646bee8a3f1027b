"""Writes the files next to an exported language model's weights: configuration, tokenizer, and generation defaults. Chooses
prompts for demonstrating the model: the first words of held-out documents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from heliostat.config.spec import Job
from heliostat.data.dataset import Dataset, open_dataset, plan
from heliostat.data.manifest import Manifest
from heliostat.errors import DataError, StorageError
from heliostat.recipes.pretrained import from_folder
from heliostat.recipes.text import infilling, vocabulary


def write(
    folder: Path,
    as_pretrained: PreTrainedConfig,
    pretrained: str | None,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    sources: list[Manifest],
) -> None:
    """Writes the files into the model's folder. Copies the tokenizer of a pretrained model; otherwise, `tokenizer` builds the
    tokenizer."""
    config = type(as_pretrained).from_dict(as_pretrained.to_dict())
    config.use_cache = True
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    _generation(pretrained, config).save_pretrained(folder)
    if pretrained:
        from_folder("model.pretrained", AutoTokenizer, pretrained).save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes(vocabulary.of_folder(Path(pretrained)))  # the original file, unchanged
    else:
        tokenizer().save_pretrained(folder)
    infilling.write(folder, sources)


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


def of_held_out(job: Job, sources: list[Manifest], tokenizer: Tokenizer, end: int, count: int = 2) -> list[str]:
    """Chooses prompts from the held-out documents of a job's datasets, or from training documents if nothing is held out."""
    try:
        samples = _samples(job, open_dataset(plan(job, sources)))
    except (DataError, StorageError, OSError) as e:
        log.warning("can't read the datasets, so the prompt is %r: %s", PLAIN, e)
        return [PLAIN]
    starts = [opening(tokenizer.decode(_beginning(tokens, end).tolist(), skip_special_tokens=True)) for tokens in samples]
    return list(dict.fromkeys(filter(None, starts)))[:count] or [PLAIN]


def _samples(job: Job, data: Dataset) -> np.ndarray:
    """Reads some held-out samples, int32 [n, sequence length], and leaves out damaged samples."""
    taken = data.order.held_out(LOOKED_AT) if job.evaluate else None
    if taken is None or not len(taken):
        taken = data.order.locate(data.order.step(0).ravel()[:LOOKED_AT])
    gathered = data.gather(taken)
    return np.delete(gathered.content, list(gathered.faults), axis=0)


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
