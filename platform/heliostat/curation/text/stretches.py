"""Encodes texts with a byte-level tokenizer, one stretch at a time. A stretch is white space followed by text without white
space. The tokens of stretches are cached, because most stretches repeat.

Before any merge, `ByteLevel` splits a text into pieces with GPT-2's pattern. The pattern allows white space only at the beginning
of a piece, and doesn't depend on the text before a piece. So a piece ends wherever white space begins. A text's tokens are then
the tokens of the text's stretches, one after another. A tokenizer that splits texts differently isn't `divisible`.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from functools import lru_cache

from tokenizers import Tokenizer, models, pre_tokenizers

SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space, as in the pattern
STRETCH = re.compile(f" [^{SPACE}]+|[{SPACE}]*[^{SPACE}]+|[{SPACE}]+")  # a single space is the most common case, and faster
ASCII_STRETCH = re.compile(r" \S+|\s*\S+|\s+", re.ASCII)  # the same for ASCII texts
BEGINS = re.compile(f"[^{SPACE}][{SPACE}]")
REMEMBERED = 1 << 16  # maximum cached stretches
LONG = 32  # characters; longer stretches aren't cached, so the cache takes 10 to 30 MB


def divisible(tokenizer: Tokenizer) -> bool:
    """Checks whether a tokenizer can encode a text stretch by stretch, with the same tokens as for the complete text. This is
    true for a byte-level BPE without a normalizer."""
    cut = tokenizer.pre_tokenizer
    return (
        tokenizer.normalizer is None
        and isinstance(cut, pre_tokenizers.ByteLevel)
        and bool(cut.use_regex)
        and not cut.add_prefix_space
        and isinstance(tokenizer.model, models.BPE)
        and not tokenizer.model.dropout
        and tokenizer.encode_special_tokens
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )


def parts(text: str, most: int) -> Iterator[str]:
    """Splits a text into parts. A part ends at the first white space after `most` characters."""
    begin = 0
    while len(text) - begin > most and (match := BEGINS.search(text, begin + most - 1)):
        yield text[begin : match.start() + 1]
        begin = match.start() + 1
    yield text[begin:]


class Stretches:
    """Encodes texts with a divisible tokenizer. Caches the tokens of stretches (white space, and the text up to the next white
    space)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = dict[str, bytes]()

    def encode(self, texts: list[str]) -> list[bytes]:
        """Returns the token ids of each text, as int32 in native byte order. Pass at most a few megabytes of texts at a time."""
        cut = [(ASCII_STRETCH if text.isascii() else STRETCH).findall(text) for text in texts]
        new = list(set().union(*cut).difference(self._known))
        if len(self._known) + len(new) > REMEMBERED:
            self._known.clear()
            new = list(set().union(*cut))
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self._known.update((stretch, array("i", one.ids).tobytes()) for stretch, one in zip(new, encodings, strict=True))
        token_bytes = [b"".join(map(self._known.__getitem__, stretches)) for stretches in cut]
        for stretch in new:
            if len(stretch) > LONG:
                del self._known[stretch]
        return token_bytes


@lru_cache(maxsize=2)
def of(tokenizer: Tokenizer) -> Stretches | None:
    """Returns the `Stretches` encoder of a tokenizer; None if the tokenizer isn't divisible. Later calls with the same tokenizer
    return the same encoder, with its cache."""
    return Stretches(tokenizer) if divisible(tokenizer) else None
