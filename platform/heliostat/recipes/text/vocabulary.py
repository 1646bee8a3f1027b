"""Compares two tokenizers, and counts the bytes of text of each token. Two tokenizers are equal if every text has the same tokens
in both, and each token has the same text.

This module doesn't compare files, because different files can contain the same tokenizer. The comparison ignores settings that
don't affect training: templates, padding, truncation, and special tokens that only one of the two tokenizers has, because no text
contains these tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, pre_tokenizers

from heliostat.data.infilling import FACT
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.storage.hub import files

STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pre-tokenizers"}


def of_folder(folder: Path) -> bytes:
    """Reads a model folder's tokenizer.json, or makes it from other files. Raises ConfigError if the folder has no readable
    tokenizer."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return file.read_bytes()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return tokenizer.backend_tokenizer.to_str().encode()
    except Exception as e:
        raise ConfigError(
            f"model.pretrained: {str(folder)!r} contains no readable tokenizer. Copy the model's tokenizer.json into this folder"
        ) from e


def load(definition: bytes, owner: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(definition.decode())
    except Exception as e:  # the library raises bare Exception
        raise ConfigError(f"{owner}: the tokenizers library can't read tokenizer.json ({e}). Copy this file again") from e


def require_same(folder: Path, source: Manifest, definition: bytes) -> None:
    """Raises ConfigError if the same token has different text in a model's tokenizer and in a dataset's tokenizer. `definition`:
    the dataset's tokenizer.json."""
    its = of_folder(folder)
    if its == definition:
        return
    field = f"model.pretrained: {files.shown(folder)!r}"
    ids = [source.fact("end_of_document"), *source.meta.get(FACT, {}).get("markers", [])]
    what = difference(load(definition, str(source.location)), load(its, field), ids)
    if what:
        raise ConfigError(
            f"{field}: the model's tokenizer differs from the tokenizer of data.sources.0.path {str(source.location)!r} "
            f"({what}). "
            f"Prepare the dataset with the model's tokenizer: write `tokenizer: {{path: {files.shown(folder)}}}` in the "
            "pipeline file"
        )


def difference(data: Tokenizer, model: Tokenizer, special: list[int]) -> str | None:
    """Describes the difference between a model's tokenizer and the dataset's tokenizer. Returns None if the tokenizers are equal.
    `special`: the token that ends documents, and the dataset's other special tokens."""
    ours, theirs = (json.loads(t.to_str()) for t in (data, model))
    if ours["model"]["type"] != theirs["model"]["type"]:
        return f"the dataset's tokenizer is {ours['model']['type']}, and the model's tokenizer is {theirs['model']['type']}"
    for number, token in enumerate(special):
        if data.id_to_token(token) != model.id_to_token(token):
            does = "mark pieces" if number else "end"
            return (
                f"the dataset's documents {does} with {_named(data, token)}, which is {_named(model, token)} in the model's "
                "tokenizer"
            )
    marks = _special(data) | _special(model)
    plain = [{t: i for t, i in x.get_vocab(with_added_tokens=True).items() if t not in marks} for x in (data, model)]
    if plain[0] != plain[1]:
        _, first = min((i, t) for t, i in plain[0].items() ^ plain[1].items())
        where = ["missing" if p.get(first) is None else f"token {p[first]}" for p in plain]
        sizes = f"of {len(plain[0]):,} and {len(plain[1]):,} tokens"
        return f"vocabularies {sizes}; {first!r} is {where[0]} in the dataset's tokenizer and {where[1]} in the model's tokenizer"
    if ours["model"].get("merges") != theirs["model"].get("merges"):
        return "the tokenizers have the same tokens, but different merges"
    for key in sorted({*ours["model"], *theirs["model"]} - {"vocab", "merges"}):
        if ours["model"].get(key) != theirs["model"].get(key):
            return (
                f"{key} is {ours['model'].get(key)!r} in the dataset's tokenizer and {theirs['model'].get(key)!r} in the model's "
                "tokenizer"
            )
    return next((f"the {many} of the two tokenizers differ" for one, many in STEPS.items() if ours[one] != theirs[one]), None)


def _special(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def _named(tokenizer: Tokenizer, i: int) -> str:
    return repr(token) if (token := tokenizer.id_to_token(i)) is not None else "missing"


FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")


def sizes(tokenizer: Tokenizer, count: int) -> tuple[list[int], list[int]]:
    """Counts the bytes of the tokens 0 to `count` - 1. Returns two lists: for tokens inside a document, and for a document's
    first token. A missing token has 0 bytes."""
    added = tokenizer.get_added_tokens_decoder()
    kinds = set(_kinds(json.loads(tokenizer.to_str())["decoder"]))
    vocabulary = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items() if i < count}
    inside, opening = [0] * count, [0] * count
    texts = {}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet()) if "ByteLevel" in kinds else set()
    spaced = _writes_a_space(tokenizer)
    for i, token in vocabulary.items():
        if i in added:
            inside[i] = opening[i] = 0 if added[i].special else len(added[i].content.encode())
        elif "ByteLevel" in kinds:
            inside[i] = len(token) if alphabet.issuperset(token) else len(token.encode())
            opening[i] = inside[i] - (spaced and token.startswith("Ġ"))
        elif "ByteFallback" in kinds and FALLBACK.fullmatch(token):
            inside[i] = opening[i] = 1
        else:
            texts[i] = token
    if texts:
        between = _between(tokenizer, list(texts))
        alone = tokenizer.decode_batch([[i] for i in texts])
        for i, middle, first in zip(texts, between, alone, strict=True):
            inside[i], opening[i] = middle, min(middle, len(first.encode()))
            if spaced and opening[i] == middle and first.startswith(" "):
                opening[i] -= 1
    return inside, opening


def _kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder:
        yield decoder["type"]
        for part in decoder.get("decoders", []):
            yield from _kinds(part)


def _writes_a_space(tokenizer: Tokenizer) -> bool:
    """Tests whether the tokenizer itself writes a leading space: whether a document gets the same tokens with and without this
    space."""
    return tokenizer.encode("a", add_special_tokens=False).ids == tokenizer.encode(" a", add_special_tokens=False).ids


def _between(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Counts the bytes that each token adds between two other tokens. Decoders write spaces before, after, or within words."""
    anchor = next((i for i in tokens if re.fullmatch("[A-Za-z]+", tokenizer.decode([i]).strip())), None)
    around = [] if anchor is None else [anchor]
    without = len(tokenizer.decode([*around, *around]).encode())
    return [len(text.encode()) - without for text in tokenizer.decode_batch([[*around, i, *around] for i in tokens])]
