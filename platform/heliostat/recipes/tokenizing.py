"""Tokenizes texts for an embedder, with the tokenizer of the datasets or of a folder."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def of_datasets(sources: list[Manifest], longest: int) -> PreTrainedTokenizerBase:
    """Loads the datasets' tokenizer, which appends the end-of-document token to each text. Raises ConfigError if the datasets
    have different tokenizers."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    raw, number = Tokenizer.from_str(definition(sources).decode()), sources[0].fact("end_of_document")
    if (end := raw.id_to_token(number)) is None:
        raise ConfigError(
            f"{sources[0].file('tokenizer.json')}: lacks token {number}, which ends documents. Prepare the dataset again"
        )
    raw.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, number)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, pad_token=end, model_max_length=longest)


def definition(sources: list[Manifest]) -> bytes:
    """Reads the datasets' `tokenizer.json`. Raises ConfigError if the datasets have different tokenizers, and DataError if the
    file is missing."""
    if len({source.meta.get("tokenizer") for source in sources}) > 1:
        raise ConfigError("data.sources: the datasets have different tokenizers. Prepare all of them with one tokenizer")
    if "tokenizer" not in sources[0].meta:
        raise ConfigError(f"data.sources: neither {sources[0].location} nor the model has a tokenizer. Set `tokenizer` in the "
            "pipeline, or use model.pretrained")  # fmt: skip
    file = sources[0].file("tokenizer.json")
    try:
        content = file.read()
    except FileNotFoundError as e:
        raise DataError(f"{file}: no such file. Prepare the dataset again") from e
    if hashlib.sha256(content).hexdigest() != sources[0].fact("tokenizer"):
        raise ConfigError(f"{file}: differs from the tokenizer that made the dataset. Prepare the dataset again")
    return content


def of_folder(folder: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a pretrained model. If the tokenizer has no padding token, the tokenizer's end token is used for
    padding."""
    from transformers import AutoTokenizer

    from heliostat.recipes.pretrained import from_folder

    tokenizer = from_folder("model.pretrained", AutoTokenizer, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fit_vocabulary(config: PreTrainedConfig, key: str, wanted: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the vocabulary size and the special tokens of a text configuration. Raises ConfigError if `wanted`, the value of the
    job's `key`, is below the tokenizer's size."""
    size = len(tokenizer)
    if wanted is not None and wanted < size:
        raise ConfigError(f"{key}: {wanted} is below the tokenizer's size. Use at least {size}")
    config.vocab_size = wanted or -(-size // 64) * 64  # matrix units are fast with multiples of 64
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id


class Tokens(NamedTuple):
    """Contains tokenized texts. `ids` and `mask`: int64 [texts, length]. `cut`: bool [texts], whether a text was truncated."""

    ids: torch.Tensor
    mask: torch.Tensor
    cut: np.ndarray


def tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int) -> Tokens:
    """Tokenizes texts with padding. A text that is too long keeps its first tokens and the end token."""
    from heliostat.recipes.batches import pad

    whole, fill = tokenizer(texts, verbose=False)["input_ids"], tokenizer.pad_token_id
    cut = np.array([len(row) > longest for row in whole])
    rows = tokenizer(texts, truncation=True, max_length=longest)["input_ids"] if cut.any() else whole
    padded = pad([row or [fill] for row in rows], fill, longest)
    return Tokens(padded.values, padded.mask.long(), cut)
