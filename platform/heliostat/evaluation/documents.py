"""Reads the documents of a prepared text dataset from its shards, chunk by chunk: the documents for training, or the held-out
documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer

from heliostat.data import conversations, infilling, manifest
from heliostat.data.chunks import Chunks, DamagedError
from heliostat.data.manifest import Manifest
from heliostat.data.split import NEWEST, split
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location


def open_text(place: Location, chats: bool = False) -> Manifest:
    """Opens a prepared dataset. Raises ConfigError if the dataset contains no text. `chats`: also opens datasets of
    conversations, whose row groups aren't held out completely."""
    dataset = manifest.read(place)
    if dataset.kind != "tokens" and not (chats and conversations.FACT in dataset.meta):
        raise ConfigError(
            f"{place}: contains {dataset.kind!r}. Only text datasets can be compared or searched. Pass a text dataset"
        )
    return dataset


def trained(dataset: Manifest, length: int | None, fraction: float, version: int = NEWEST) -> np.ndarray:
    """Returns the numbers of the chunks that training uses, for a sequence length and a held-out fraction.

    `version`: the version of the rules that split the dataset.
    """
    return np.flatnonzero(split(dataset, length, fraction, version).train > 0)


def held_out(dataset: Manifest, fraction: float) -> np.ndarray:
    """Returns the numbers of the chunks that training never uses, at any sequence length."""
    return np.flatnonzero(split(dataset, 1, fraction).held > 0)


class Documents:
    """Reads the texts of a dataset's documents. `damaged`: an error for each chunk that can't be read. The texts of such a chunk
    are left out."""

    def __init__(self, dataset: Manifest) -> None:
        length = 1 if dataset.kind == "tokens" else None
        self._chunks, self._end = Chunks([dataset], length), dataset.meta.get("end_of_document")
        self._markers = infilling.Markers.of(dataset.meta)
        self._tokenizer = Tokenizer.from_str(dataset.file("tokenizer.json").read().decode())
        self.damaged: list[str] = []

    def token(self, id: int) -> str:
        """Returns the text of the token with this id in the dataset's vocabulary."""
        return str(self._tokenizer.id_to_token(id))

    def texts(self, chunks: Iterable[int]) -> Iterator[list[str]]:
        """Yields the texts of each chunk's documents.

        A pack yields the text of each conversation, and a preference yields its prompt with each answer. A document in several
        chunks yields a text for each chunk. A document that was rearranged for filling in the middle yields a text for each span.
        """
        for chunk in chunks:
            try:
                content = self._chunks.read(0, int(chunk))
            except DamagedError as e:
                self.damaged.append(str(e))
                continue
            if isinstance(content, np.ndarray):
                ids = infilling.texts(content[:, 0], self._end, self._markers)
            else:
                ids = conversations.token_lists(content)
            yield self._tokenizer.decode_batch(ids, skip_special_tokens=True)
