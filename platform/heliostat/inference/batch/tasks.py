"""Answers a piece of the input in a Ray worker. Writes the answers to one Parquet file, and the inputs without an answer to
another file."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import Field, ValidationInfo, field_validator, model_validator

from heliostat.curation.pieces import FilePart
from heliostat.curation.segment import DocumentSource
from heliostat.curation.stage import Document, Dropped
from heliostat.schema import Strict
from heliostat.storage.locations import Location
from heliostat.tasks import shipping
from heliostat.tasks.shipping import Shipment

if TYPE_CHECKING:
    from heliostat.inference.batch.engines import Answer, Input

ANSWERS, BAD = "answers", "bad"
BAD_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
WRITTEN = [("answer", pa.large_string()), ("tokens", pa.int32()), ("finish", pa.string())]
COLUMNS = {
    "continue": WRITTEN,
    "chat": WRITTEN,
    "score": [("nats", pa.float64()), ("tokens", pa.int64()), ("bits_per_byte", pa.float64()), ("truncated", pa.bool_())],
    "embed": [("embedding", pa.list_(pa.float32())), ("tokens", pa.int64()), ("truncated", pa.bool_())],
    "classify": [("label", pa.string()), ("probability", pa.float64()), ("probabilities", pa.list_(pa.float64())),
                 ("tokens", pa.int64()), ("truncated", pa.bool_())],
    "embed-images": [("embedding", pa.list_(pa.float32()))],
}  # fmt: skip


Task = Literal["continue", "chat", "score", "embed", "classify", "embed-images"]
COLUMN = {"chat": "messages", "embed-images": "image"}  # default input column of these tasks; all other tasks read `text`


class BatchSettings(Strict):
    """Describes a batch inference. Its answers depend only on these settings, the model, and the input."""

    task: Task = "continue"
    column: str = Field("", validate_default=True)
    """Column of the input with the prompt, the messages, the image, or the text to score, embed, or classify."""
    keep: list[str] = []
    """Columns of the input to copy to the output, as text."""
    batch: int = Field(16, ge=1, le=4096)
    """Batch size: inputs that the model reads together."""
    seed: int = Field(0, ge=0, lt=2**63)
    options: dict[str, object] = {}
    """Generation options: `max_tokens`, `temperature`, `top_p`."""
    engine: Literal["transformers", "vllm"] = "transformers"

    @field_validator("column")
    @classmethod
    def _named(cls, value: str, info: ValidationInfo) -> str:
        return value or COLUMN.get(info.data.get("task", ""), "text")

    @property
    def written(self) -> tuple[str, ...]:
        """Returns the columns that are copied from the input to the answers: the text, and the columns in `keep`."""
        return (*([] if self.task == "embed-images" else [self.column]), *self.keep)

    @property
    def identity(self) -> dict[str, object]:
        """Returns all settings that determine the answers. Leaves out `engine` if it is transformers. So the keys of tasks stay
        the same as before the setting `engine` existed."""
        return self.model_dump(exclude={"engine"} if self.engine == "transformers" else None)

    @model_validator(mode="after")
    def _apart(self) -> BatchSettings:
        """Rejects a kept column if another column of the answers has the same name."""
        written = ["id", *self.written, *(name for name, _ in COLUMNS[self.task])]
        if twice := sorted({name for name in written if written.count(name) > 1}):
            raise ValueError(f"the answers would have two columns {twice[0]!r}. Rename the input's column")
        return self


class PieceRecord(TypedDict):
    """Describes the answers to a piece of the input: the record that the piece's Ray task returns. `Flow` adds `seconds`
    (processor time) and `wall` (elapsed time).

    Records of earlier versions lack some keys.
    """

    name: str
    answers: int
    bytes: int
    bad: int
    bad_bytes: int
    tokens: int
    truncated: int
    inputs: str
    read: NotRequired[int]
    gpu: NotRequired[tuple[str, int] | None]
    kept: NotRequired[dict[str, int]]
    files: list[str]
    seconds: NotRequired[float]
    wall: NotRequired[float]


def schema(settings: BatchSettings) -> pa.Schema:
    """Returns the columns of a task's answers: the input's id and text, the kept columns, and the answer's columns."""
    return pa.schema([("id", pa.string()), *((name, pa.large_string()) for name in settings.written), *COLUMNS[settings.task]])


def answer_piece(
    spill: Location, piece: list[FilePart], source: DocumentSource, output: str, name: str, model: Shipment,
    settings: dict[str, object],
    follows: str,
) -> dict[str, object]:  # fmt: skip
    """Answers the documents of a piece, and writes the answers in the input's order; returns the task's record.

    `model`: the model's files; `follows`: the digest of these files. Two copies of a late task can write the same files at the
    same time: each write replaces a complete file by a complete file (`Location.write`).
    """
    items = list(chain.from_iterable(source.read(part) for part in piece))
    read = [item for item in items if isinstance(item, Document)]
    bad = [[item.id, item.reason, item.detail] for item in items if isinstance(item, Dropped)]
    keys = BatchSettings.model_validate(settings)
    kept = [{column: _text(one.columns.get(column)) for column in keys.keep} for one in read]
    wrong = [_unwritable(one) for one in kept]
    bad += [[one.id, "not_utf8", f"the kept column {column!r}"] for one, column in zip(read, wrong, strict=True) if column]
    open_ = [(one, columns) for one, columns, column in zip(read, kept, wrong, strict=True) if not column]
    rows = []
    folder = shipping.here(spill, model)
    for (document, columns), answer in zip(open_, _answers(folder, keys, [one for one, _ in open_], follows), strict=True):
        if answer.bad:
            bad.append([document.id, answer.bad, _spelt(answer.detail)])
        else:
            rows.append({"id": document.id, keys.column: document.text, **columns, **answer.values})
    place = Location(output)
    answered = _write(place.join(ANSWERS, f"{name}.parquet"), pa.Table.from_pylist(rows, schema(keys))) if rows else 0
    listed = pa.Table.from_arrays([pa.array(values) for values in zip(*bad, strict=True)], schema=BAD_SCHEMA) if bad else None
    return {
        "name": name, "answers": len(rows), "bytes": answered, "bad": len(bad),
        "bad_bytes": _write(place.join(BAD, f"{name}.parquet"), listed) if listed is not None else 0,
        "tokens": sum(row.get("tokens", 0) for row in rows),
        "truncated": sum(bool(row.get("truncated")) for row in rows),
        "inputs": _digest(read), "read": len(read), "gpu": _gpu(),
        "kept": {column: sum(column in one.columns for one in read) for column in keys.keep},
        "files": [],
    }  # fmt: skip


def _answers(model: str, settings: BatchSettings, documents: list[Document], follows: str) -> list[Answer]:
    """Answers documents. If the engine dies, removes the engine from the cache, so that no later task uses it."""
    from heliostat.inference.batch.engines import DeadEngineError

    engine = loaded(model, settings.task, settings.batch, json.dumps(settings.options, sort_keys=True), settings.engine, follows)
    try:
        return engine([_input(document, settings.seed) for document in documents])
    except DeadEngineError:
        loaded.cache_clear()
        raise


def _input(document: Document, seed: int) -> Input:
    """Converts a document to an input. The input's seed depends on the inference's seed and the document's id."""
    from heliostat.inference.batch.engines import Input

    own = xxhash.xxh64_intdigest(f"{seed}\0{document.id}".encode("utf-8", "surrogatepass")) >> 1
    return Input(str(document.text), own, document.picture.data if document.picture else b"")


def _gpu() -> tuple[str, int] | None:
    """Returns the name and the memory, in bytes, of the GPU; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory


def _digest(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.id, document.text]).encode())
        digest.update(hashlib.sha256(document.picture.data).digest() if document.picture else b"")
    return digest.hexdigest()


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def _unwritable(columns: dict[str, str | None]) -> str | None:
    """Returns the name of a column whose text UTF-8 can't encode (JSON can contain half a surrogate pair). None if every text
    can be encoded."""
    return next((name for name, value in columns.items() if value is not None and value != _spelt(value)), None)


def _spelt(text: str) -> str:
    """Returns the text, with escapes in place of characters that UTF-8 can't encode."""
    return text.encode(errors="backslashreplace").decode()


def _write(place: Location, table: pa.Table) -> int:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    place.write(buffer.getvalue())
    return buffer.tell()


@lru_cache(maxsize=1)
def loaded(
    model: str, task: str, batch: int, options: str, by: str = "transformers", follows: str = ""
) -> Callable[[Sequence[Input]], list[Answer]]:
    """Loads a model once per process. The model stays in memory for later tasks with the same model files, kind of task, and
    options."""
    from heliostat.inference.batch.loading import engine

    return engine(Path(model), task, batch, json.loads(options), by)
