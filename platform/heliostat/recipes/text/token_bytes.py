"""Counts the bytes of text that each token of a tokenizer stands for, whatever its kind; so bits per byte compare between
tokenizers.

Tokens of byte-level tokenizers are bytes, and byte fallback's `<0xE2>` is one. For all others it is what the token adds to a
decoded text: a space for SentencePiece's `▁the` and WordPiece's `the`, none for `##ing`; special tokens stand for nothing. At the
start of a document, tokenizers add a space that is not in the text, and it is not counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")


def sizes(tokenizer: Tokenizer, count: int) -> tuple[list[int], list[int]]:
    """Counts the bytes behind each of the tokens 0 to `count` - 1: inside a document, and as its first; 0 if it is missing."""
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
    """Tests whether a document that begins without a space gets the tokens of one that begins with it."""
    return tokenizer.encode("a", add_special_tokens=False).ids == tokenizer.encode(" a", add_special_tokens=False).ids


def _between(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Counts the bytes that each token adds between two others: decoders write spaces before, behind or within words."""
    anchor = next((i for i in tokens if re.fullmatch("[A-Za-z]+", tokenizer.decode([i]).strip())), None)
    around = [] if anchor is None else [anchor]
    without = len(tokenizer.decode([*around, *around]).encode())
    return [len(text.encode()) - without for text in tokenizer.decode_batch([[*around, i, *around] for i in tokens])]
