"""Audits the loss masks of datasets of packs before the first step: reads some row groups, and compares them with the facts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from heliostat.data.chunks import Chunks, DamagedError
from heliostat.data.conversations import ConversationFacts
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes.auditing import MarkedText, MaskAudit, SourceAudit
from heliostat.recipes.text import packs, templates
from heliostat.recipes.text.packs import Conversation

MOST_UNTRAINED = 0.001  # share of rows without a trained token, above which a run doesn't start
ROW_GROUPS, BYTES = 8, 16 << 20  # of a source, that the audit reads at most, but at least one row group
EXAMPLES = 3
LONGEST = 400  # characters of a part of an example
COUNTED = ("conversations", "tokens", "trained", "untrained")  # facts that the rows of a complete dataset must confirm


class MaskCounts:
    """Counts the rows, conversations, tokens, and turns of packs. `end`: the token that ends a turn. `length`, `vocabulary`: see
    `packs.mask`."""

    def __init__(self, end: int, length: int, vocabulary: int) -> None:
        self.end, self.length, self.vocabulary = end, length, vocabulary
        self.rows = self.conversations = self.tokens = self.trained = 0
        self.untrained = self.untrained_rows = self.turns = self.trained_ends = 0

    def add(self, content: pa.Table) -> None:
        """Adds rows. Raises DataError for a row that isn't a valid pack."""
        mask = packs.mask(content, self.length, self.vocabulary)
        first = np.zeros(len(mask.tokens), bool)
        first[mask.begins] = True
        ends = mask.trained & np.append(~mask.trained[1:] | first[1:], True)  # the last token of each trained turn
        self.rows += len(content)
        self.conversations += len(mask.begins)
        self.tokens += len(mask.tokens)
        self.trained += int(mask.trained.sum())
        self.untrained += int((~np.logical_or.reduceat(mask.trained, mask.begins)).sum())
        self.untrained_rows += int((~np.logical_or.reduceat(mask.trained, mask.row_begins)).sum())
        self.turns += int(ends.sum())
        self.trained_ends += int((ends & (mask.tokens == self.end)).sum())


def audit(sources: list[Manifest], facts: list[ConversationFacts], tokenizer: Tokenizer) -> MaskAudit:
    """Audits each source. Raises ConfigError if too many rows have nothing to train, or if rows contradict the facts."""
    rows, examples, warnings = list[SourceAudit](), list[list[MarkedText]](), list[str]()
    for number, (source, known) in enumerate(zip(sources, facts, strict=True)):
        field = f"data.sources.{number}.path: {str(source.location)!r}"
        templates.of_dataset(source, known["template"])  # raises if the template changed
        counts, unreadable = MaskCounts(known["end"], known["sequence_length"], source.fact("vocab_size")), 0
        for content in sample(source, number, sources):
            if content is None:
                unreadable += 1
                continue
            counts.add(content)
            if len(examples) < EXAMPLES:
                few = itertools.islice(packs.conversations(content), EXAMPLES - len(examples))
                examples += [marked(conversation, tokenizer) for conversation in few]
        _require_trained(field, counts)
        _require_confirmed(field, source, known, counts)
        total = known["counts"]
        if counts.turns and not counts.trained_ends:
            warnings.append(f"{field}: the end of no turn is trained, so the model doesn't learn to stop")
        rows.append(
            {
                "name": source.meta.get("name", source.location.name), "path": str(source.location),
                "template": known["template"],
                "conversations": total["conversations"], "rows": source.rows, "tokens": total["tokens"],
                "trained": total["trained"], "trained_share": total["trained"] / max(1, total["tokens"]),
                "fill": total["tokens"] / max(1, total["tokens"] + total["padding"]),
                "sampled_rows": counts.rows, "untrained_rows": counts.untrained_rows, "sampled_turns": counts.turns,
                "trained_ends": counts.trained_ends, "unreadable": unreadable,
            }
        )  # fmt: skip
    return {"sources": rows, "examples": examples, "warnings": warnings}


def sample(source: Manifest, number: int, sources: list[Manifest]) -> Iterator[pa.Table | None]:
    """Reads row groups of a source, evenly spread, at most ROW_GROUPS and about BYTES. Yields None for a damaged row group."""
    chunks, sizes, read = Chunks(sources, None), source.chunks["bytes"].to_numpy(), 0
    spread = np.unique(np.linspace(0, len(sizes) - 1, min(ROW_GROUPS, len(sizes))).astype(int))
    for chunk in spread.tolist():
        if read and read + int(sizes[chunk]) > BYTES:
            return
        read += int(sizes[chunk])
        try:
            yield chunks.read(number, chunk)
        except DamagedError:
            yield None


def _require_trained(field: str, counts: MaskCounts) -> None:
    share = counts.untrained_rows / max(1, counts.rows)
    if share > MOST_UNTRAINED:
        raise ConfigError(
            f"{field}: {counts.untrained_rows:,} of {counts.rows:,} rows ({share:.1%}) have no trained token, which is above "
            f"{MOST_UNTRAINED:.1%}. Prepare the dataset again with another `turns` or "
            "`template`, or without these conversations"
        )


def _require_confirmed(field: str, source: Manifest, known: ConversationFacts, counts: MaskCounts) -> None:
    """Raises ConfigError if the rows that were read can't be those of a dataset with these facts."""
    if "forgotten" in source.meta:  # the facts describe the dataset before its documents were removed
        return
    complete, total = counts.rows == source.rows, known["counts"]
    for name in COUNTED:
        read = getattr(counts, name)
        if read != total[name] if complete else read > total[name]:
            raise ConfigError(
                f"{field}: the rows have {read:,} of {name!r}, but the manifest says {total[name]:,}. Prepare the dataset again"
            )
    mostly_ended = 2 * total["trained_ends"] > total["turns"]  # conversations that are cut have no end
    if known["end_of_turn"] and mostly_ended and counts.turns and not counts.trained_ends:
        raise ConfigError(
            f"{field}: the manifest says that ends of turns are trained, but no trained turn of the rows ends with token "
            f"{known['end']}. Prepare the dataset again"
        )


def marked(conversation: Conversation, tokenizer: Tokenizer) -> list[MarkedText]:
    """Decodes a conversation into parts that are trained, or aren't trained. Shortens long parts in the middle."""
    edges = [0, *(np.flatnonzero(np.diff(conversation.trained)) + 1).tolist(), len(conversation.tokens)]
    return [
        {
            "text": shortened(tokenizer.decode(conversation.tokens[begin:end].tolist(), skip_special_tokens=False)),
            "trained": bool(conversation.trained[begin]),
        }
        for begin, end in itertools.pairwise(edges)
    ]


def shortened(text: str) -> str:
    """Replaces the middle of a long text by the number of characters that are left out."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} […{len(text) - LONGEST:,} characters…] {text[-half:]}"
