"""Encodes texts by a byte-level tokenizer a stretch at a time, and remembers the tokens of stretches, most of which come again.

A stretch is white space with what stands behind it. GPT-2's pattern, by which `ByteLevel` cuts a text before any merge, takes
white space at the beginning of a piece alone, and looks at nothing before a piece. So a piece ends wherever white space begins,
and the tokens of a text are those of its stretches, one behind another. Tokenizers that cut otherwise are not `divisible`.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from functools import lru_cache

from tokenizers import Tokenizer, models, pre_tokenizers

SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space, as the pattern has it
STRETCH = re.compile(f" [^{SPACE}]+|[{SPACE}]*[^{SPACE}]+|[{SPACE}]+")  # one space is what there mostly is, and faster
ASCII_STRETCH = re.compile(r" \S+|\s*\S+|\s+", re.ASCII)  # the same of such texts
BEGINS = re.compile(f"[^{SPACE}][{SPACE}]")
REMEMBERED = 1 << 16  # stretches
LONG = 32  # characters, of which longer stretches are forgotten: so all that is remembered takes 10 to 30 MB


def divisible(tokenizer: Tokenizer) -> bool:
    """Tells whether a tokenizer's tokens of a text are those of its stretches: a byte-level BPE without anything before it."""
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
    """Cuts a text where white space begins, as soon as it may behind `most` characters."""
    begin = 0
    while len(text) - begin > most and (match := BEGINS.search(text, begin + most - 1)):
        yield text[begin : match.start() + 1]
        begin = match.start() + 1
    yield text[begin:]


class Stretches:
    """Encodes texts by a divisible tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = dict[str, bytes]()

    def encode(self, texts: list[str]) -> list[bytes]:
        """Returns the token ids of each text, as int32 in the machine's order; texts are to be few megabytes together."""
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
    """Returns what encodes by a tokenizer, the same while the tokenizer is in use; None if it is not divisible."""
    return Stretches(tokenizer) if divisible(tokenizer) else None
