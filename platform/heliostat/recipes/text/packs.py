"""Makes batches from packs: rows that contain one or more conversations, one after another (`data.conversations.PACKS`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from heliostat.data.conversations import PACKS
from heliostat.errors import DataError
from heliostat.recipes.protocol import IGNORED, Batch

MULTIPLE = 64  # rows are padded to a multiple of this number of tokens, so that there are few different shapes


class RowsMask(NamedTuple):
    """Contains the tokens of packs, one after another. `tokens`: int32 [tokens]. `trained`: bool [tokens]. `begins`,
    `row_begins`: the index of the first token of each conversation, and of each row."""

    tokens: np.ndarray
    trained: np.ndarray
    begins: np.ndarray
    row_begins: np.ndarray


def mask(content: pa.Table, length: int, vocabulary: int) -> RowsMask:
    """Returns the tokens and the mask of packs. `length`: the maximum tokens of a row. `vocabulary`: the number of tokens. Raises
    DataError for a row that isn't a valid pack."""
    tokens, trained, lengths = (_values(content, name) for name in ("tokens", "trained", "lengths"))
    sizes = _counts(content, "tokens")
    _require_valid(content, tokens, lengths, sizes, length, vocabulary)
    return RowsMask(tokens, trained, np.cumsum(lengths) - lengths, np.cumsum(sizes) - sizes)


def batch(content: pa.Table, length: int, fill: int, vocabulary: int, apart: bool, fixed: bool) -> Batch:
    """Makes a batch of packs: `input_ids` and `labels`, int64 [rows, width].

    A token has a label if it is trained, except a conversation's first token. `apart`: adds `position_ids`, which restart at each
    conversation and at the padding, so that attention keeps conversations apart.

    `length`, `vocabulary`: see `mask`. `fill`: the token of the padding. `fixed`: pads all rows to `length`; otherwise pads only
    to the longest row. Raises DataError for a row that isn't a valid pack.
    """
    tokens, trained, begins, row_begins = mask(content, length, vocabulary)
    sizes = np.diff(row_begins, append=len(tokens))
    width = length if fixed else min(length, max(MULTIPLE, -(-int(sizes.max()) // MULTIPLE) * MULTIPLE))
    learned = trained.copy()
    learned[begins] = False
    columns = np.arange(width)
    real = columns < sizes[:, None]
    ids, labels = np.full((len(sizes), width), fill, np.int64), np.full((len(sizes), width), IGNORED, np.int64)
    ids[real] = tokens
    labels[real] = np.where(learned, tokens, IGNORED)
    tensors = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if apart:
        positions = columns - sizes[:, None]  # of the padding
        positions[real] = np.arange(len(tokens)) - np.repeat(begins, np.diff(begins, append=len(tokens)))
        tensors["position_ids"] = torch.from_numpy(positions)
    return tensors


class Conversation(NamedTuple):
    """Contains a conversation of a pack. `tokens`: int32 [tokens]. `trained`: bool [tokens]."""

    id: str
    tokens: np.ndarray
    trained: np.ndarray


def conversations(content: pa.Table) -> Iterator[Conversation]:
    """Yields the conversations of packs, in order."""
    lengths = _values(content, "lengths")
    cuts = np.cumsum(lengths)[:-1]
    parts = (np.split(_values(content, name), cuts) for name in ("tokens", "trained"))
    yield from map(Conversation, _column(content, "ids").flatten().to_pylist(), *parts)


def placeholder(rows: int, length: int) -> pa.Table:
    """Returns rows of one conversation of `length` tokens, all of them trained."""
    row = {"ids": [""], "lengths": [length], "tokens": [0] * length, "trained": [True] * length}
    return pa.Table.from_pylist([row] * rows, schema=PACKS)


def _values(content: pa.Table, name: str) -> np.ndarray:
    """Returns the values of a list column, of all rows one after another."""
    column = _column(content, name)
    values = column.flatten()
    if column.null_count or values.null_count:
        raise DataError(f"a batch of packs has missing values in {name!r}. Prepare the dataset again")
    return values.to_numpy(zero_copy_only=False)


def _counts(content: pa.Table, name: str) -> np.ndarray:
    return _column(content, name).value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


def _column(content: pa.Table, name: str) -> pa.ListArray:
    column = content[name].combine_chunks()
    return column if isinstance(column, pa.ListArray) else pa.concat_arrays(column.chunks)


def _require_valid(
    content: pa.Table, tokens: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, length: int, vocabulary: int
) -> None:
    """Raises DataError unless every row's tokens are those of its conversations, have a mask, and fit the model."""
    counts = _counts(content, "lengths")
    sums = np.add.reduceat(np.append(lengths, 0), np.cumsum(counts) - counts) * (counts > 0)
    masks = _counts(content, "trained")
    empty = np.add.reduceat(np.append(lengths < 1, 0), np.cumsum(counts) - counts) * (counts > 0)
    wrong = (sums != sizes) | (masks != sizes) | (sizes > length) | (sizes == 0) | (empty > 0)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"a pack of {sizes[row]:,} tokens, {masks[row]:,} mask values, and conversations of {sums[row]:,} tokens doesn't fit "
            f"samples of 1 to {length:,} tokens. Prepare the dataset again"
        )
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise DataError(
            f"a pack has tokens from {tokens.min()} to {tokens.max()}, but the vocabulary has {vocabulary:,} tokens. Prepare the "
            "dataset again"
        )
