"""Defines the format of texts that train a model to fill in a middle, and of the prompts for this task.

    PREFIX prefix SUFFIX suffix MIDDLE middle       (prefix, suffix, middle: PSM)
    PREFIX SUFFIX suffix MIDDLE prefix middle       (suffix, prefix, middle: SPM)

Both are formats of Bavarian et al. 2022, with the three pieces tokenized separately. In both, the original text is the tokens
after PREFIX, then the tokens after MIDDLE, then the tokens after SUFFIX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from heliostat.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FACT = "fill_in_the_middle"  # key in a dataset's metadata: the pipeline's keys, and the ids of `markers`
COUNTS = "rearranged"  # key in the metadata: the counts of rearranged documents and texts
OWN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # of tokenizers that heliostat trains, and of Qwen and CodeGemma
KNOWN = (
    OWN,
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
ENDS = ("▁<EOT>",)  # tokens that end a middle in place of the end of the document: Code Llama
ANCHOR = "☺"  # encoded before a text; some tokenizers put a space first, which then isn't part of the text
PROBE = "def x"


@dataclass(frozen=True)
class Markers:
    """Holds the ids of the tokens that precede the prefix, the suffix, and the middle."""

    prefix: int
    suffix: int
    middle: int

    @staticmethod
    def of(meta: Mapping[str, Any]) -> Markers | None:
        """Reads the markers from a dataset's metadata; None if the dataset has no rearranged texts."""
        return Markers(*meta[FACT]["markers"]) if FACT in meta else None

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int], suffix_first: bool) -> list[int]:
        """Builds the prompt for a middle: the tokens of a prefix and a suffix, in the order that the model was trained on, with
        markers."""
        if suffix_first:
            return [self.prefix, self.suffix, *suffix, self.middle, *prefix]
        return [self.prefix, *prefix, self.suffix, *suffix, self.middle]

    def restored(self, tokens: np.ndarray) -> np.ndarray:
        """Restores the order of a text's tokens, and removes the markers. `tokens`: without the token that ends a document."""
        begun = len(tokens) > 0 and tokens[0] == self.prefix
        suffix, middle = (np.flatnonzero(tokens == marker) for marker in (self.suffix, self.middle))
        if not (begun and len(suffix) and len(middle)):  # not rearranged, or continued in another row group
            return tokens[~np.isin(tokens, [self.prefix, self.suffix, self.middle])]
        s, m = int(suffix[0]), int(middle[0])
        return np.concatenate([tokens[1:s], tokens[m + 1 :], tokens[s + 1 : m]])

    def counted(self, documents: Sequence[np.ndarray]) -> dict[str, int]:
        """Counts the rearranged documents and texts.

        `documents`: documents with a rearranged text; `texts`: rearranged texts; `suffix_first`: rearranged texts that begin with
        the suffix. These are SPM texts, and PSM texts with an empty prefix, which have the same tokens.
        """
        middles = [int((tokens == self.middle).sum()) for tokens in documents]
        first = [int(((tokens[:-1] == self.prefix) & (tokens[1:] == self.suffix)).sum()) for tokens in documents]
        return {"documents": sum(map(bool, middles)), "texts": sum(middles), "suffix_first": sum(first)}


def texts(tokens: np.ndarray, end: int | None, markers: Markers | None) -> list[list[int]]:
    """Splits tokens at the ends of documents, and restores the order of rearranged texts. Empty texts are left out.

    `end`: id of the token that ends a document; `markers`: None if no text is rearranged.
    """
    return [(part if markers is None else markers.restored(part)).tolist() for part in _parts(tokens, end)]


def _parts(tokens: np.ndarray, end: int | None) -> list[np.ndarray]:
    ends = [] if end is None else np.flatnonzero(tokens == end).tolist()
    return [tokens[a:b] for a, b in zip([0, *(e + 1 for e in ends)], [*ends, len(tokens)], strict=True) if b > a]


def text(tokenizer: Tokenizer, tokens: np.ndarray, end: int | None, markers: Markers) -> str:
    """Returns the original text of a document.

    The document consists of spans, each of which ends with the token `end` and may be rearranged.

    Exception: if the tokenizer puts a space before each text, the space before a span that isn't rearranged may differ.
    """
    before = tokenizer.encode(ANCHOR, add_special_tokens=False).ids  # keeps the decoder from removing a leading space of the span
    opening, parts = tokenizer.decode(before, skip_special_tokens=False), list[str]()
    for part in _parts(tokens, end):
        if part[0] == markers.prefix:
            decoded = tokenizer.decode([*before, *markers.restored(part).tolist()], skip_special_tokens=False)
            parts.append(decoded.removeprefix(opening))
        else:
            parts.append(tokenizer.decode(part.tolist(), skip_special_tokens=False))
    return "".join(parts)


def names(tokenizer: Tokenizer) -> tuple[str, str, str] | None:
    """Returns the names of the tokenizer's three markers, if a known model uses these markers; None if the tokenizer has no
    known markers."""
    return next((known for known in KNOWN if all(tokenizer.token_to_id(name) is not None for name in known)), None)


def find(tokenizer: Tokenizer, named: Sequence[str]) -> Markers:
    """Returns the markers with these names. Raises ConfigError if the tokenizer lacks a marker."""
    ids = [token for name in named if (token := tokenizer.token_to_id(name)) is not None]
    if len(ids) != 3:
        raise ConfigError(
            f"{FACT}: {list(named)} aren't three tokens of the tokenizer. Use the names of three tokens in tokenizer.json"
        )
    return Markers(*ids)


def encode(tokenizer: Tokenizer, pieces: list[str]) -> list[list[int]]:
    """Encodes the pieces of a text. If you join the pieces' tokens and decode them, you get the text.

    Some tokenizers put a space before each text, but these pieces don't get such a space. Raises ConfigError if the tokenizer
    can't leave out this space.
    """
    before, alone, behind = (tokenizer.encode(text, add_special_tokens=False).ids for text in (ANCHOR, PROBE, ANCHOR + PROBE))
    anchor = "" if behind == before + alone else ANCHOR
    before = before if anchor else []
    texts = [anchor + piece for piece in (PROBE, *pieces)]
    encoded = [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    probe, *rest = [ids[len(before) :] for ids in encoded]
    apart = tokenizer.decode(probe).removeprefix(" ") == PROBE and all(ids[: len(before)] == before for ids in encoded)
    if anchor and not apart:
        raise ConfigError(f"{FACT}: the tokenizer puts a space before each text, even within a document. Use another tokenizer")
    return rest
