"""Rearranges documents for fill-in-the-middle training (Bavarian et al. 2022).

The hash of a document's text, and the seed, determine whether and how the document is rearranged. So the result is the same on
any cluster. All functions are pure.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from heliostat.config.fields import Seed
from heliostat.curation.text import tokens
from heliostat.data import infilling
from heliostat.data.infilling import FACT, Markers
from heliostat.errors import ConfigError
from heliostat.schema import Float, Strict

WORD = 1 << 64  # a drawn number is below this


class FillInTheMiddle(Strict):
    """Configures the share of texts that heliostat rearranges, so that a model learns to write the middle of a text."""

    rate: Float = Field(0.5, gt=0, le=1)
    """Share of texts (documents, or their spans) to rearrange."""
    spm_rate: Float = Field(0.5, ge=0, le=1)
    """Share of the rearranged texts with the order suffix, prefix, middle (SPM). The other rearranged texts have the order
    prefix, suffix, middle (PSM)."""
    span_chars: int | None = Field(8192, ge=16)
    """Maximum characters of a span. Longer documents are split into spans of about equal length, and `rate` applies to each span.
    Choose about the length of a sample. null: documents aren't split."""
    seed: Seed = 0
    """Random seed for the choice of texts and for the positions at which they are split."""


@dataclass(frozen=True)
class Arranged:
    """Holds the prefix, middle, and suffix of a rearranged text."""

    prefix: str
    middle: str
    suffix: str
    suffix_first: bool

    @property
    def pieces(self) -> tuple[str, str, str]:
        return self.prefix, self.middle, self.suffix


def spans(text: str, most: int | None) -> list[str]:
    """Splits a text into spans of about equal length, with at most `most` characters. No span is empty."""
    count = 1 if most is None else max(1, -(-len(text) // most))
    bounds = [i * len(text) // count for i in range(count + 1)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def arrange(text: str, digest: str, keys: FillInTheMiddle) -> list[str | Arranged]:
    """Divides a document into unchanged texts (strings) and rearranged texts. Two unchanged texts never follow each other.
    `digest`: the hash of the document's text, in hex."""
    out: list[str | Arranged] = []
    for number, span in enumerate(spans(text, keys.span_chars)):
        drawn = draws(f"{keys.seed} {digest} {number}")
        if drawn[0] >= keys.rate * WORD:
            plain = out.pop() if out and isinstance(out[-1], str) else ""
            out.append(f"{plain}{span}")
            continue
        first, last = sorted(draw * (len(span) + 1) // WORD for draw in drawn[2:])
        out.append(Arranged(span[:first], span[first:last], span[last:], drawn[1] < keys.spm_rate * WORD))
    return out


def draws(name: str) -> list[int]:
    """Returns four pseudorandom integers below 2**64, which depend only on `name`."""
    raw = hashlib.sha256(name.encode()).digest()
    return [int.from_bytes(raw[i : i + 8], "big") for i in range(0, 32, 8)]


def encode(tokenizer: Tokenizer, documents: list[list[str | Arranged]], end: int, markers: Markers) -> list[np.ndarray]:
    """Encodes each document to token ids (int32). Appends `end` to each of the document's texts."""
    plain = iter(tokens.encode(tokenizer, [text for document in documents for text in document if isinstance(text, str)], end))
    cut = [piece for document in documents for text in document if isinstance(text, Arranged) for piece in text.pieces]
    pieces = (ids for batch in tokens.batches(cut) for ids in infilling.encode(tokenizer, batch))
    return [
        np.concatenate([next(plain) if isinstance(text, str) else _joined(text, pieces, end, markers) for text in document])
        for document in documents
    ]


def _joined(text: Arranged, pieces: Iterator[list[int]], end: int, markers: Markers) -> np.ndarray:
    prefix, middle, suffix = (next(pieces) for _ in text.pieces)
    return np.array([*markers.prompt(prefix, suffix, text.suffix_first), *middle, end], np.int32)


def names(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Returns the names of a tokenizer's fill-in-the-middle tokens (markers). Raises ConfigError if the tokenizer has no known
    markers."""
    markers = infilling.names(tokenizer)
    if markers is None:
        known = "; ".join(", ".join(one) for one in infilling.KNOWN)
        raise ConfigError(
            f"{FACT}: the tokenizer has none of the tokens that mark prefix, middle, and suffix ({known}). "
            "Use another tokenizer, or train a tokenizer (tokenizer.vocab_size)"
        )
    return markers


def marking(definition: str, named: tuple[str, ...]) -> str:
    """Returns a tokenizer's definition (JSON) in which the fill-in-the-middle tokens are special tokens. Then the name of such a
    token in a text is encoded as plain text. In some models' tokenizers, these tokens aren't special."""
    tokenizer_json = json.loads(definition)
    added: dict[str, dict[str, Any]] = {token["content"]: token for token in tokenizer_json.get("added_tokens") or []}
    if missing := [name for name in named if name not in added]:
        raise ConfigError(
            f"{FACT}: {missing[0]!r} isn't an added token of the tokenizer. "
            "Use another tokenizer, or train a tokenizer (tokenizer.vocab_size)"
        )
    if all(added[name]["special"] for name in named):
        return definition
    for name in named:
        added[name] |= {"special": True, "normalized": False}
    return json.dumps(tokenizer_json, ensure_ascii=False)
