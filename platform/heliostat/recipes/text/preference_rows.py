"""Makes batches from rows of preferences (`data.conversations`). Each row gives two sequences: the prompt with the chosen answer,
and the prompt with the rejected answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from heliostat.data.conversations import REFERENCE, REFERENCE_COLUMNS
from heliostat.errors import DataError
from heliostat.recipes.batches import pad
from heliostat.recipes.protocol import IGNORED, Batch

MULTIPLE = 64  # of a batch's length, so that few different shapes exist
FIX = "Prepare the dataset again"


class PreferenceRow(NamedTuple):
    """Holds the tokens of a row, int32 each."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def batch(content: pa.Table, longest: int, vocabulary: int, reference: bool, fixed: bool = False) -> Batch:
    """Makes a batch of n rows: `input_ids` and `labels`, int64 [n, 2, length], and `host_prompts`, int64 [n]: the prompts'
    numbers of tokens.

    The length is a multiple of 64, or `longest`. `vocabulary`: the number of tokens. `reference`: also `reference`, fp64 [n, 2],
    the answers' log-probabilities under the reference. `fixed`: the length is `longest`, and there are no `host_prompts`, so that
    a model gets the same shapes in all batches. Raises DataError, which names the row, for a row that can't be trained on.
    """
    rows = [_checked(row, name, longest, vocabulary) for row, name in zip(_rows(content), content["id"].to_pylist(), strict=True)]
    sequences = [np.concatenate([row.prompt, answer]) for row in rows for answer in (row.chosen, row.rejected)]
    filled = pad(sequences, longest=longest, multiple=longest if fixed else MULTIPLE)
    prompts = torch.tensor([len(row.prompt) for row in rows])
    answered = filled.mask & (torch.arange(filled.values.shape[1]) >= prompts.repeat_interleave(2).unsqueeze(1))
    tensors = {"input_ids": filled.values, "labels": filled.values.masked_fill(~answered, IGNORED)}
    batch_tensors = {name: tensor.view(len(rows), 2, -1) for name, tensor in tensors.items()}
    if not fixed:
        batch_tensors["host_prompts"] = prompts
    return batch_tensors | {"reference": _reference(content)} if reference else batch_tensors


def last(batch: Batch) -> int:
    """Returns the number of final positions that contain all answers and the token before each, rounded up to a multiple of
    64. Returns the length if the batch is `fixed`."""
    length = batch["input_ids"].shape[-1]
    if "host_prompts" not in batch:
        return length
    needed = length - int(batch["host_prompts"].min()) + 1
    return min(length, padded(needed))


def placeholder(rows: int, length: int) -> pa.Table:
    """Returns rows of the maximum length, with the shortest prompt, which need the most memory."""
    answer = length - 1
    row = {"id": "", "prompt": [0], "chosen": [0] * answer, "rejected": [1] * answer, **dict.fromkeys(REFERENCE_COLUMNS, 0.0)}
    return pa.Table.from_pylist([row] * rows, schema=REFERENCE)


def lengths(content: pa.Table) -> np.ndarray:
    """Returns the number of tokens of each row's longer sequence, int64 [rows]."""
    prompt, *answers = (content[name].combine_chunks().value_lengths().to_numpy() for name in PreferenceRow._fields)
    return (prompt + np.maximum(*answers)).astype(np.int64)


def padded(tokens: int) -> int:
    """Returns the length of a batch whose longest sequence has this number of tokens."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def _rows(content: pa.Table) -> Iterator[PreferenceRow]:
    columns = [content[name].combine_chunks() for name in PreferenceRow._fields]
    for number in range(len(content)):
        yield PreferenceRow(*(np.asarray(column[number].values if column[number].is_valid else ()) for column in columns))


def _checked(row: PreferenceRow, name: str, longest: int, vocabulary: int) -> PreferenceRow:
    """Returns a row that can be trained on. Otherwise raises DataError."""
    for column, tokens in row._asdict().items():
        if not tokens.size:
            raise DataError(f"row {name!r}: `{column}` has no tokens. {FIX}")
        if not 0 <= tokens.min() <= tokens.max() < vocabulary:  # on a GPU, the embedding's error would end the process
            raise DataError(
                f"row {name!r}: `{column}` has tokens from {tokens.min()} to {tokens.max()}, but the vocabulary has "
                f"{vocabulary:,} tokens. {FIX}"
            )
    if np.array_equal(row.chosen, row.rejected):
        raise DataError(f"row {name!r}: `chosen` and `rejected` are equal, so the row has no preference. {FIX}")
    if (length := len(row.prompt) + max(len(row.chosen), len(row.rejected))) > longest:
        raise DataError(f"row {name!r}: the prompt and an answer have {length} tokens, above the dataset's {longest}. {FIX}")
    return row


def _reference(content: pa.Table) -> torch.Tensor:
    values = np.stack([content[name].to_numpy() for name in REFERENCE_COLUMNS], 1).astype(np.float64)
    if (bad := ~np.isfinite(values).all(1)).any():
        name = content["id"][int(bad.argmax())].as_py()
        raise DataError(f"row {name!r}: a log-probability of the reference isn't finite. Compute the dataset's reference again")
    return torch.from_numpy(values)
