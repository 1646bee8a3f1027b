"""Defines the rows of datasets of conversations, and the facts in their manifests. Pipelines write these rows; recipes read them.

Two forms exist. In a dataset of *packs*, a row contains one or more conversations, one after another, for supervised fine-tuning.
In a dataset of *preferences*, a row contains a prompt and two answers, for DPO. Both are datasets of kind "rows", and both have
the facts of token datasets: `tokenizer.json`, `vocab_size`, and `end_of_document`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
from typing_extensions import TypedDict

from heliostat.data.dataset import DataPlan
from heliostat.data.manifest import Manifest

FACT = "conversations"  # key of `ConversationFacts` in the manifest's metadata
TEMPLATE = "chat_template.jinja"  # file of the dataset: the template that rendered its conversations

PACKS = pa.schema(
    [
        ("ids", pa.list_(pa.string())),  # the id of each conversation
        ("lengths", pa.list_(pa.int32())),  # the tokens of each conversation; their sum is at most `sequence_length`
        ("tokens", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),  # for each token: whether the model learns to predict this token
    ]
)
PREFERENCES = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.list_(pa.int32())),  # ends where the answer starts
        ("chosen", pa.list_(pa.int32())),  # the better answer, which includes the end of its turn
        ("rejected", pa.list_(pa.int32())),
    ]
)
# log-probabilities of the answers under the reference model, in nats: a dataset with a reference has these columns too
REFERENCE_COLUMNS = ("reference_chosen", "reference_rejected")
REFERENCE = pa.schema([*PREFERENCES, *(pa.field(name, pa.float64()) for name in REFERENCE_COLUMNS)])


class Reference(TypedDict):
    """Describes the model that computed the log-probabilities of a dataset. `digest`: the digest of the model's folder."""

    digest: str
    precision: str


CONTENTS = {"packs": "conversations", "preferences": "preferences"}  # of each form, for people


class ConversationFacts(TypedDict):
    """Describes a dataset of conversations.

    `template`: XXH3-128 digest of the template's text, in hex. `turns`: the assistant's turns that the model learns. `end`: id of
    the token that ends an answer. If the template has no such token, `end` is `end_of_document`, which follows each conversation.
    `counts`: the numbers of `conversations`, `tokens`, `trained` tokens, `turns`, `trained_ends` (turns whose end is trained),
    `untrained` conversations (without trained tokens), `cut`, `split`, `retokenized` (their tokens differ if the text is
    tokenized as a whole), `ended` (conversations to which `end_of_document` was added), and `padding` (tokens that are missing in
    packs).
    """

    form: Literal["packs", "preferences"]
    sequence_length: int  # maximum tokens of a row; for preferences, of the prompt with an answer
    template: str
    turns: Literal["all", "each", "last"]
    end: int
    end_of_turn: bool  # whether the token that ends a turn is trained
    counts: dict[str, int]
    reference: Reference | None


def token_lists(content: pa.Table) -> list[list[int]]:
    """Returns the tokens of each conversation of packs, or of each prompt with an answer of preferences."""
    if "lengths" not in content.column_names:
        rows = content.select(["prompt", "chosen", "rejected"]).to_pylist()
        return [row["prompt"] + row[answer] for row in rows for answer in ("chosen", "rejected")]
    lists = list[list[int]]()
    for row in content.select(["lengths", "tokens"]).to_pylist():
        ends = itertools.accumulate(row["lengths"])
        lists += [row["tokens"][end - size : end] for end, size in zip(ends, row["lengths"], strict=True)]
    return lists


def tokens(source: Manifest) -> int:
    """Returns the tokens of a dataset of texts or conversations, without padding. 0 if the dataset has no tokens."""
    facts = source.meta.get(FACT)
    return facts["counts"]["tokens"] if facts else source.tokens


def row_tokens(source: Manifest) -> float:
    """Returns the mean tokens of a row, without padding. 0 if the dataset has no conversations."""
    return tokens(source) / max(1, source.rows) if FACT in source.meta else 0.0


def sample_tokens(sources: Sequence[Manifest], plan: DataPlan) -> float:
    """Returns the tokens of a sample. For conversations, returns the mean over the sources, by their first weights. 0 if samples
    have no tokens."""
    if plan.sequence_length:
        return plan.sequence_length
    weighted = (weight * row_tokens(source) for weight, source in zip(plan.weights, sources, strict=True))
    return sum(weighted) / (sum(plan.weights) or 1.0)
