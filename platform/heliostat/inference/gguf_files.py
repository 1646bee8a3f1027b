"""Reads what a GGUF file states about itself: its architecture, the types of its tensors, and its tokenizer.

GGUF is the format of llama.cpp. A file has one model with its tokenizer and chat template, and usually quantized weights.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliostat import extras
from heliostat.errors import ConfigError
from heliostat.text import brief, printable

SUFFIX = ".gguf"
PART = re.compile(r"-\d{5}-of-\d{5}$")  # the end of a name, if a model is split into several files
BLOCK = 16 << 20
OTHER = 0.1  # share of tokens with other ids above which a tokenizer is that of another model; added tokens may differ
MOST_VALUES = 8_000_000  # of metadata; the tokenizer with the most tokens has about 2 million
UNQUANTIZED = ("F64", "F32", "F16", "BF16")
# llama.cpp's names of pre-tokenizers that transformers doesn't list. Both kinds split text as GPT-2 does.
LIKE_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion")
DIGITS_ALONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")  # first, each digit alone


@dataclass(frozen=True)
class GgufFile:
    """Describes a GGUF file. `types`: the number of matrices of each type; `bits`: bits per weight, over all tensors.

    `pre_tokenizer`: llama.cpp's name of the rules that split text; None if the tokenizer isn't a byte-level BPE. `tokens`: all
    tokens by id; empty if the file has no tokenizer.
    """

    path: Path
    architecture: str
    license: str | None
    types: dict[str, int]
    bits: float
    weights: int
    pre_tokenizer: str | None
    has_tokenizer: bool
    tokens: list[str] = field(repr=False)

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
    try:
        reader = _reader(path)
        tensors = [(str(t.tensor_type.name), len(t.shape), int(t.n_elements), int(t.n_bytes)) for t in reader.tensors]
        names = ("general.architecture", "general.license", "tokenizer.ggml.model", "tokenizer.ggml.pre")
        architecture, license, kind, pre = (_text(reader, name) for name in names)
        listed = reader.get_field("tokenizer.ggml.tokens")
        tokens = [str(token) for token in listed.contents()] if listed else []
        layers = reader.get_field(f"{architecture}.block_count")
        if layers is not None and layers.contents() > len(tensors):
            raise ValueError(f"it has {layers.contents():,} layers, but {len(tensors):,} tensors")
    except Exception as e:
        raise ConfigError(f"PATH: {path.name} isn't a readable GGUF file ({brief(e)}). Download the file again") from e
    weights = sum(count for *_, count, _ in tensors)
    types = Counter(name for name, dimensions, *_ in tensors if dimensions > 1)
    if not types or not weights:
        raise ConfigError(f"PATH: {path.name} has no weights, only metadata. Pass the file with the model's weights")
    return GgufFile(
        path=path,
        architecture=str(architecture),
        license=license,
        types=dict(types.most_common()),
        bits=8 * sum(size for *_, size in tensors) / weights,
        weights=weights,
        pre_tokenizer=str(pre) if kind == "gpt2" else None,
        has_tokenizer=kind is not None,
        tokens=tokens,
    )


def _reader(path: Path) -> Any:
    """Reads a file's metadata with the library, which itself reads on after the file's end: 80 bytes can name an array that fills
    the memory. Raises ValueError there, and for more than MOST_VALUES values."""
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        parts_read = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, *rest: Any, **named: Any) -> Any:
            values = super()._get(offset, dtype, count, *rest, **named)
            self.parts_read += 1
            if len(values) < int(count) or self.parts_read > MOST_VALUES:
                raise ValueError("its metadata is longer than the file" if len(values) < int(count) else "too much metadata")
            return values

    return Bounded(path)


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else printable(str(field.contents()))


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


def require_own(file: GgufFile, tokens: list[str]) -> None:
    """Raises ConfigError if a tokenizer.json next to a file is of another model. `tokens`: the tokens of tokenizer.json by id."""
    shared = min(len(file.tokens), len(tokens))
    differ = sum(own != other for own, other in zip(file.tokens, tokens, strict=False))
    if differ > OTHER * shared:
        raise ConfigError(
            f"PATH: the tokenizer.json next to {file.path.name} is of another model ({differ:,} of {shared:,} tokens differ). "
            "Move the file to a folder of its own"
        )
