"""Encodes texts with a byte-level tokenizer, one stretch at a time. A stretch is white space followed by text without white
space. The tokens of stretches are cached, because most stretches repeat.

Before any merge, `ByteLevel` splits a text into pieces with GPT-2's pattern. The pattern allows white space only at the beginning
of a piece, and doesn't depend on the text before a piece. So a piece ends wherever white space begins. A text's tokens are then
the tokens of the text's stretches, one after another. A tokenizer that splits texts differently isn't `divisible`.

Encoding a stretch alone takes longer than encoding its characters. So new stretches are joined with a special token, which the
tokenizer splits off before everything else (`_Separator`).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space, as in the pattern
STRETCH = re.compile(f" [^{SPACE}]+|[{SPACE}]*[^{SPACE}]+|[{SPACE}]+")  # a single space is the most common case, and faster
ASCII_STRETCH = re.compile(r" \S+|\s*\S+|\s+", re.ASCII)  # the same for ASCII texts
BEGINS = re.compile(f"[^{SPACE}][{SPACE}]")
REMEMBERED = 1 << 16  # maximum cached stretches
JOINED = 256  # stretches that are joined
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


@dataclass(frozen=True)
class _Separator:
    """Describes a special token between stretches. No beginning of its text is also an end, so two occurrences can't overlap, and
    it has no rules about the text around it. `others`: the ids of all other special tokens."""

    text: str
    id: int
    others: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Separator | None:
        """Returns the separator for a tokenizer; None if it has no suitable special token."""
        special = tokenizer.get_added_tokens_decoder()
        for id, token in special.items():
            text = token.content
            overlaps = any(text.startswith(text[at:]) for at in range(1, len(text)))
            if text and not (overlaps or token.lstrip or token.rstrip or token.single_word):
                return cls(text, id, np.array([other for other in special if other != id], np.int32))
        return None

    def split(self, ids: np.ndarray, count: int) -> list[bytes] | None:
        """Returns the tokens (int32, as bytes) of each of `count` joined stretches. Returns None if a stretch has the text of a
        special token."""
        ends = np.flatnonzero(ids == self.id)
        if len(ends) != count - 1 or np.isin(ids, self.others).any():
            return None
        data, begins, stops = ids.tobytes(), [0, *(4 * ends + 4).tolist()], [*(4 * ends).tolist(), 4 * len(ids)]
        return [data[begin:stop] for begin, stop in zip(begins, stops, strict=True)]


class Stretches:
    """Encodes texts with a divisible tokenizer. Caches the tokens of stretches (white space, and the text up to the next white
    space)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._separator = tokenizer, _Separator.of(tokenizer)
        self._known = dict[str, bytes]()

    def encode(self, texts: list[str]) -> list[bytes]:
        """Returns the token ids of each text, as int32 in native byte order. Pass at most a few megabytes of texts at a time."""
        cut = [(ASCII_STRETCH if text.isascii() else STRETCH).findall(text) for text in texts]
        new = list(set().union(*cut).difference(self._known))
        if len(self._known) + len(new) > REMEMBERED:
            self._known.clear()
            new = list(set().union(*cut))
        self._known.update(zip(new, self._encoded(new), strict=True))
        token_bytes = [b"".join(map(self._known.__getitem__, stretches)) for stretches in cut]
        for stretch in new:
            if len(stretch) > LONG:
                del self._known[stretch]
        return token_bytes

    def _encoded(self, new: list[str]) -> Iterator[bytes]:
        """Yields the tokens of each stretch."""
        if self._separator is None:
            yield from self._alone(new)
            return
        groups = [new[at : at + JOINED] for at in range(0, len(new), JOINED)]
        self._tokenizer.encode_special_tokens = False
        try:
            encodings = self._tokenizer.encode_batch_fast(list(map(self._separator.text.join, groups)), add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        for group, encoding in zip(groups, encodings, strict=True):
            yield from self._separator.split(np.array(encoding.ids, np.int32), len(group)) or self._alone(group)

    def _alone(self, group: list[str]) -> list[bytes]:
        encodings = self._tokenizer.encode_batch_fast(group, add_special_tokens=False)
        return [array("i", one.ids).tobytes() for one in encodings]


@lru_cache(maxsize=2)
def of(tokenizer: Tokenizer) -> Stretches | None:
    """Returns the `Stretches` encoder of a tokenizer; None if the tokenizer isn't divisible. Later calls with the same tokenizer
    return the same encoder, with its cache."""
    return Stretches(tokenizer) if divisible(tokenizer) else None
