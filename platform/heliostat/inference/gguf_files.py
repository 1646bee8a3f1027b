"""Reads what a GGUF file states about itself: its architecture, the types of its tensors, and its tokenizer.

GGUF is the format of llama.cpp. A file has one model with its tokenizer and chat template, and usually quantized weights.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat import extras
from heliostat.errors import ConfigError
from heliostat.text import brief

SUFFIX = ".gguf"
PART = re.compile(r"-\d{5}-of-\d{5}$")  # the end of a name, if a model is split into several files
BLOCK = 16 << 20
UNQUANTIZED = ("F64", "F32", "F16", "BF16")
# llama.cpp's names of pre-tokenizers that transformers doesn't list. Both kinds split text as GPT-2 does.
LIKE_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion")
DIGITS_ALONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")  # first, each digit alone


@dataclass(frozen=True)
class GgufFile:
    """Describes a GGUF file. `types`: the number of matrices of each type; `bits`: bits per weight, over all tensors.

    `pre_tokenizer`: llama.cpp's name of the rules that split text; None if the tokenizer isn't a byte-level BPE.
    """

    path: Path
    architecture: str
    license: str | None
    types: dict[str, int]
    bits: float
    weights: int
    pre_tokenizer: str | None
    has_tokenizer: bool

    @property
    def precision(self) -> str:
        """Returns the precision of the converted weights: the precision of the file's matrices, or bf16 if they're quantized."""
        return {"F32": "fp32", "F16": "fp16"}.get(next(iter(self.types)), "bf16") if len(self.types) == 1 else "bf16"

    @property
    def quantized(self) -> bool:
        return any(name not in UNQUANTIZED for name in self.types)

    def digest(self) -> str:
        """Computes the SHA-256 of the file, in hex."""
        digest = hashlib.sha256()
        with self.path.open("rb") as f:
            while block := f.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()


def locate(path: Path) -> Path:
    """Returns the path of the GGUF file: `path` itself, or the only GGUF file in the folder `path`. Raises ConfigError if there
    is no such file, or more than one."""
    if path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}"))
        if len(files) != 1:
            names = f"has {len(files)} GGUF files, such as {files[0].name}" if files else "has no GGUF file"
            raise ConfigError(f"PATH: {path} {names}. Pass the path of one GGUF file")
        path = files[0]
    if not path.is_file():
        raise ConfigError(f"PATH: no such file ({path}). Pass a GGUF file, or a folder with one")
    if path.suffix != SUFFIX:
        raise ConfigError(f"PATH: isn't a GGUF file ({path.name}). A folder with safetensors needs no import")
    if PART.search(path.stem):
        raise ConfigError(f"PATH: {path.name} is one part of a model. Merge the parts first: llama-gguf-split --merge")
    return path


def read(path: Path) -> GgufFile:
    """Reads a file's metadata, but no weights. Raises ConfigError if the file is damaged, and MissingExtraError if the module
    `gguf` is missing."""
    extras.require("gguf", "gguf", what="heliostat model import")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        tensors = [(str(t.tensor_type.name), len(t.shape), int(t.n_elements), int(t.n_bytes)) for t in reader.tensors]
        architecture = str(_value(reader, "general.architecture"))
    except Exception as e:
        raise ConfigError(f"PATH: {path.name} isn't a readable GGUF file ({brief(e)}). Download the file again") from e
    weights = sum(count for *_, count, _ in tensors)
    types = Counter(name for name, dimensions, *_ in tensors if dimensions > 1)
    if not types:
        raise ConfigError(f"PATH: {path.name} has no weights, only metadata. Pass the file with the model's weights")
    license, kind = _value(reader, "general.license"), _value(reader, "tokenizer.ggml.model")
    return GgufFile(
        path=path,
        architecture=architecture,
        license=None if license is None else str(license),
        types=dict(types.most_common()),
        bits=8 * sum(size for *_, size in tensors) / weights,
        weights=weights,
        pre_tokenizer=str(_value(reader, "tokenizer.ggml.pre")) if kind == "gpt2" else None,
        has_tokenizer=kind is not None,
    )


def _value(reader: Any, key: str) -> object:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def split_digits(file: GgufFile) -> bool:
    """Returns whether the file's tokenizer splits numbers into digits before anything else, which transformers doesn't do.

    Raises ConfigError if the file's pre-tokenizer is unknown, because with another one the model's texts would have other tokens
    than in its training.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = file.pre_tokenizer
    if name is None or name in GGUF_PRE_TOKENIZER_SPLITS or name in LIKE_GPT2:
        return False
    if name in DIGITS_ALONE:
        return True
    raise ConfigError(
        f"PATH: {file.path.name} has an unknown pre-tokenizer ({name}). Copy the original model's tokenizer.json and "
        "tokenizer_config.json into the folder of this file"
    )
