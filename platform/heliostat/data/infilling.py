"""Defines how a text that is rearranged for filling in its middle lies in a dataset, and how a model is asked for a middle.

    PREFIX prefix SUFFIX suffix MIDDLE middle       (prefix, suffix, middle: PSM)
    PREFIX SUFFIX suffix MIDDLE prefix middle       (suffix, prefix, middle: SPM)

Both are those of Bavarian et al. 2022, where the three pieces have their tokens apart. What lies behind PREFIX, behind MIDDLE and
behind SUFFIX, in this order, is the text again, in either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from heliostat.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FACT = "fill_in_the_middle"  # in a dataset's metadata: the pipeline's keys, and the ids of `markers`
COUNTS = "rearranged"  # next to it: how many
OWN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # of tokenizers that are trained here; also Qwen's and CodeGemma's
KNOWN = (
    OWN,
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
ENDS = ("▁<EOT>",)  # what ends a middle where it is not the end of a document: Code Llama
ANCHOR = "☺"  # a text before which tokenizers put their space, so that what follows it has none
PROBE = "def x"


@dataclass(frozen=True)
class Markers:
    """Holds the ids of the tokens that stand before the pieces."""

    prefix: int
    suffix: int
    middle: int

    @staticmethod
    def of(meta: Mapping[str, Any]) -> Markers | None:
        """Reads the markers from a dataset's metadata; None if nothing in it is rearranged."""
        return Markers(*meta[FACT]["markers"]) if FACT in meta else None

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int], suffix_first: bool) -> list[int]:
        """Puts the tokens of a prefix and a suffix in the order in which a model continues with the middle."""
        if suffix_first:
            return [self.prefix, self.suffix, *suffix, self.middle, *prefix]
        return [self.prefix, *prefix, self.suffix, *suffix, self.middle]

    def restored(self, tokens: np.ndarray) -> np.ndarray:
        """Puts the tokens of a text, without its end, in the order of the text, without markers."""
        begun = len(tokens) > 0 and tokens[0] == self.prefix
        suffix, middle = (np.flatnonzero(tokens == marker) for marker in (self.suffix, self.middle))
        if not (begun and len(suffix) and len(middle)):  # as it is, or a piece of one that continues in another chunk
            return tokens[~np.isin(tokens, [self.prefix, self.suffix, self.middle])]
        s, m = int(suffix[0]), int(middle[0])
        return np.concatenate([tokens[1:s], tokens[m + 1 :], tokens[s + 1 : m]])

    def counted(self, documents: Sequence[np.ndarray]) -> dict[str, int]:
        """Counts the documents of which something is rearranged, the texts that are, and those of them that begin with the
        suffix: SPM, and PSM with nothing before the middle, which is the same."""
        middles = [int((tokens == self.middle).sum()) for tokens in documents]
        first = [int(((tokens[:-1] == self.prefix) & (tokens[1:] == self.suffix)).sum()) for tokens in documents]
        return {"documents": sum(map(bool, middles)), "texts": sum(middles), "suffix_first": sum(first)}


def texts(tokens: np.ndarray, end: int | None, markers: Markers | None) -> list[list[int]]:
    """Splits tokens at the ends of documents, and restores what is rearranged; empty ones are left out."""
    return [(part if markers is None else markers.restored(part)).tolist() for part in _parts(tokens, end)]


def _parts(tokens: np.ndarray, end: int | None) -> list[np.ndarray]:
    ends = [] if end is None else np.flatnonzero(tokens == end).tolist()
    return [tokens[a:b] for a, b in zip([0, *(e + 1 for e in ends)], [*ends, len(tokens)], strict=True) if b > a]


def text(tokenizer: Tokenizer, tokens: np.ndarray, end: int | None, markers: Markers) -> str:
    """Returns the text of a document whose spans, each with its `end`, are rearranged or not; but for a space before one that is
    not, where the tokenizer puts one before each text."""
    before = tokenizer.encode(ANCHOR, add_special_tokens=False).ids  # so that the decoder takes no space of a span away
    opening, parts = tokenizer.decode(before, skip_special_tokens=False), list[str]()
    for part in _parts(tokens, end):
        if part[0] == markers.prefix:
            decoded = tokenizer.decode([*before, *markers.restored(part).tolist()], skip_special_tokens=False)
            parts.append(decoded.removeprefix(opening))
        else:
            parts.append(tokenizer.decode(part.tolist(), skip_special_tokens=False))
    return "".join(parts)


def names(tokenizer: Tokenizer) -> tuple[str, str, str] | None:
    """Finds the markers that a tokenizer has among those of known models; None if it has none."""
    return next((known for known in KNOWN if all(tokenizer.token_to_id(name) is not None for name in known)), None)


def find(tokenizer: Tokenizer, named: Sequence[str]) -> Markers:
    """Returns the markers of these names; ConfigError if the tokenizer lacks one."""
    ids = [token for name in named if (token := tokenizer.token_to_id(name)) is not None]
    if len(ids) != 3:
        raise ConfigError(f"{FACT}: {list(named)} aren't three tokens of the tokenizer")
    return Markers(*ids)


def encode(tokenizer: Tokenizer, pieces: list[str]) -> list[list[int]]:
    """Encodes pieces of a text, so that one behind the other is the text: without the space that some tokenizers put before a
    text; ConfigError if it cannot be kept away."""
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
