"""Chooses one of several captions of an image for each sample, such as the caption of the web and that of a captioning model.

    captions: [{text: "{caption}", weight: 3}, {text: "{original_caption}"}, {text: "a photo of a {label}"}]

A text contains the names of columns of the dataset in braces. In datasets that store text embeddings, a text is one column. The
pipeline stored the embeddings of this column (`columns.captions`) by each text encoder. If a column is empty for an image, the
image has the text `{caption}`.

The choice depends only on train.seed and the sample's key. It is the same for captions as text and for stored embeddings.
Held-out samples keep their choice in every evaluation.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, field_validator

from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes.counter_random import uniform, words
from heliostat.recipes.images.rows import StoredText, footer
from heliostat.schema import Float, Strict, nearest

STREAM = 1 << 8  # stream of random numbers for the choice
CAPTION = "caption"


class CaptionText(Strict):
    text: str = Field(min_length=1)
    """Text of the caption. Names of columns in braces, such as `{label}`, stand for the values of these columns."""
    weight: Float = Field(default=1.0, gt=0)
    """Weight of this text among the captions."""

    @field_validator("text")
    @classmethod
    def _names_columns(cls, text: str) -> str:
        for _, name, form, conversion in string.Formatter().parse(text):
            if name is not None and (not name.isidentifier() or form or conversion):
                raise ValueError(f"expected names of columns in braces, got {text!r}. For example: a photo of a {{label}}")
        return text

    @property
    def columns(self) -> list[str]:
        """Lists the columns in the text."""
        return [name for _, name, _, _ in string.Formatter().parse(self.text) if name]


def chosen(
    content: pa.Table, captions: Sequence[CaptionText], seed: int, keys: np.ndarray, stored: Sequence[str] = ()
) -> pa.Table:
    """Replaces the column `caption` by the chosen captions, or the columns `stored` by their embeddings. `keys`: int64 [n].
    `stored`: the columns with the embeddings of `caption`, if the dataset stores embeddings."""
    choice = choose(captions, seed, keys)
    for column in stored or (CAPTION,):
        values = _embeddings(content, captions, choice, column) if stored else _texts(content, captions, choice)
        content = content.set_column(content.column_names.index(column), column, pa.array(values, content[column].type))
    return content


def choose(captions: Sequence[CaptionText], seed: int, keys: np.ndarray) -> np.ndarray:
    """Chooses a caption for each key, int64 [n]: the index in `captions`. `keys`: int64 [n]."""
    drawn = uniform(words(seed, torch.from_numpy(keys.astype(np.int64)), STREAM, 1)[:, 0]).double().numpy()
    bounds = np.cumsum([caption.weight for caption in captions])
    return np.searchsorted(bounds[:-1] / bounds[-1], drawn, side="right")


def _texts(content: pa.Table, captions: Sequence[CaptionText], choice: np.ndarray) -> list[str]:
    names = {CAPTION, *(name for caption in captions for name in caption.columns)}
    return [_text(row, captions[i]) for row, i in zip(content.select(sorted(names)).to_pylist(), choice, strict=True)]


def _text(row: dict[str, str | None], caption: CaptionText) -> str:
    filled = all(row[name] for name in caption.columns)
    return caption.text.format_map(row) if filled else str(row[CAPTION])


def _embeddings(content: pa.Table, captions: Sequence[CaptionText], choice: np.ndarray, stored: str) -> list[bytes]:
    columns = [content[embedding_column(stored, caption.columns[0])].to_pylist() for caption in captions]
    own = content[stored].to_pylist()
    return [columns[i][row] or own[row] for row, i in enumerate(choice)]


def embedding_column(stored: str, column: str) -> str:
    """Returns the name of the column with the embeddings of a column's texts. `stored`: the name for the column `caption`."""
    return stored if column == CAPTION else f"{stored}_{column}"


def require_columns(captions: Sequence[CaptionText], sources: Sequence[Manifest]) -> None:
    """Raises ConfigError if a dataset lacks a column of the captions. Reads the footer of a shard of each dataset."""
    for number, caption in enumerate(captions):
        for source in sources:
            _require(f"model.captions.{number}.text", caption, source)


def _require(key: str, caption: CaptionText, source: Manifest) -> None:
    stored, embedded = footer(source.location.join(source.paths[0])).schema.names, embeddings(source)
    if embedded and caption.text != f"{{{''.join(caption.columns)}}}":
        raise ConfigError(
            f"{key}: {caption.text!r} isn't one column, but {source.location} stores embeddings of captions. Use the name of "
            "a column in braces, such as {caption}"
        )
    for name in caption.columns:
        if any(embedding_column(one, name) not in stored for one in embedded):
            problem = f"{source.location} stores no embeddings of the column {name!r}"
            raise ConfigError(f"{key}: {problem}. Add this column to the pipeline's columns.captions")
        if name not in stored:
            raise ConfigError(f"{key}: {source.location} has no column {name!r}{nearest(name, stored)}")


def embeddings(source: Manifest) -> list[str]:
    """Lists a dataset's columns with the embeddings of `caption`; empty without embeddings."""
    single = ["embedding"] if source.meta.get("text") is not None else []
    return single + [column for one in source.meta.get("texts", ()) for column, _ in StoredText(**one).columns.values()]
