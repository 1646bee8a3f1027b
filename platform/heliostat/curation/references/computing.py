"""Computes the log-probabilities of a shard's answers under a reference model, and writes the shard with these values: two tasks
on Ray. The first needs the model, and its result is small. So an interrupted run repeats no finished computation. On GPUs, the
first runs in a stream (`references.stream`).

A value doesn't depend on the other rows of its batch, except for rounding in the precision of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data import row_groups, versions
from heliostat.data.conversations import PREFERENCES, REFERENCE, REFERENCE_COLUMNS
from heliostat.data.manifest import PLACES_KEY
from heliostat.data.row_groups import FORM
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.tasks import shipping, spill
from heliostat.tasks.shipping import Shipment

if TYPE_CHECKING:
    import torch

KIND = "reference"  # of the tasks that compute
CONTENT = b"content"  # in a shard's footer: a digest of all values
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ReferenceModel:
    """Describes how to compute: the model's files, its precision, and the device. `longest`: maximum tokens of a sequence.
    `batch_tokens`: maximum tokens of a batch, with padding."""

    shipment: Shipment
    precision: str
    on_gpu: bool
    longest: int
    batch_tokens: int


@dataclass(frozen=True)
class SourceShard:
    """Describes a shard of the input: the dataset's folder, and the shard's path and footer digest."""

    dataset: str
    path: str
    footer: str

    def read(self) -> pq.ParquetFile:
        return pq.ParquetFile(pa.BufferReader(Location(self.dataset).join(self.path).read()))


def pairs_of(file: pq.ParquetFile, group: int) -> pa.Table:
    """Reads a row group of a shard."""
    return file.read_row_group(group, PREFERENCES.names)


def compute(folder: Location, shard: SourceShard, model: ReferenceModel) -> dict[str, object]:
    """Computes the log-probabilities of a shard's answers. Returns the name of the temporary file of values, fp64 [rows, 2]."""
    loaded, file = loaded_once(shipping.here(folder, model.shipment), model), shard.read()
    groups = [logprobs(loaded, pairs_of(file, group), model) for group in range(file.num_row_groups)]
    values = np.concatenate([np.empty((0, 2)), *groups])
    name = spill.put(folder, values.tobytes(), ".bin")
    return {"values": name, "documents": len(values), "files": [name]}


@lru_cache(maxsize=1)
def loaded_once(folder: str, model: ReferenceModel) -> torch.nn.Module:
    """Loads the model once per process."""
    import torch

    from heliostat.recipes.text import generator

    loaded = generator.whole("model", folder, dtype=getattr(torch, DTYPES[model.precision]))
    loaded.config.use_cache = False
    return loaded.eval().to("cuda" if model.on_gpu else "cpu")


def logprobs(loaded: torch.nn.Module, rows: pa.Table, model: ReferenceModel) -> np.ndarray:
    """Computes the log-probabilities of the chosen and the rejected answers, fp64 [rows, 2]. Raises DataError, which names the
    row, if a row can't be trained on, or if a value isn't finite."""
    import torch

    from heliostat.recipes.text import answer_logprobs, preference_rows

    values, device = np.empty((len(rows), 2)), next(loaded.parameters()).device
    vocabulary = loaded.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr, operator]
    for some in batches(preference_rows.lengths(rows), model.batch_tokens):
        batch = preference_rows.batch(rows.take(pa.array(some)), model.longest, vocabulary, reference=False)
        placed = {name: tensor if name.startswith("host_") else tensor.to(device) for name, tensor in batch.items()}
        with torch.inference_mode():
            values[some] = answer_logprobs.of_pairs(loaded, placed).cpu().numpy()
    if (bad := ~np.isfinite(values).all(1)).any():
        name = rows["id"][int(bad.argmax())].as_py()
        raise DataError(f"row {name!r}: the reference's log-probability isn't finite. Use another model, or precision: fp32")
    return values


def batches(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Divides rows into batches of rows of similar lengths. Yields the rows' numbers of each batch, the longest rows first.

    `lengths`: the tokens of each row's longer sequence. `tokens`: maximum tokens of a batch; a longer row is a batch of its own.
    """
    from heliostat.recipes.text.preference_rows import padded

    order = np.argsort(-lengths, kind="stable")
    while len(order):
        count = max(1, tokens // (2 * padded(int(lengths[order[0]]))))
        yield order[:count]
        order = order[count:]


def write_shard(folder: Location, shard: SourceShard, values: list[str], prefix: str, output: str) -> dict[str, Any]:
    """Writes a shard with its log-probabilities, in the same row groups. `values`: their temporary files, in the order of the
    rows. Returns the shard's rows of the manifest."""
    parts = [np.empty(0)]
    for name in values:
        with spill.whole(folder, name):
            parts.append(np.frombuffer(folder.join(name).read()))
    computed = np.concatenate(parts).reshape(-1, 2)
    data, place = joined(shard.read(), computed), Location(output)
    path = versions.store(place, prefix, data, ".parquet")
    return {"shards": [{**row_groups.written(place, path, data, None), "documents": len(computed)}], "files": []}


def joined(file: pq.ParquetFile, values: np.ndarray) -> bytes:
    """Returns a shard of preferences with log-probabilities as the bytes of a Parquet file."""
    sink, begin, before = pa.BufferOutputStream(), 0, file.metadata.metadata or {}
    with pq.ParquetWriter(sink, REFERENCE, **FORM) as writer:
        for group in range(file.num_row_groups):
            table = pairs_of(file, group)
            for name, column in zip(REFERENCE_COLUMNS, values[begin : begin + len(table)].T, strict=True):
                table = table.append_column(name, pa.array(column))
            writer.write_table(table.cast(REFERENCE), row_group_size=max(1, len(table)))
            begin += len(table)
        content = hashlib.sha256((before.get(CONTENT) or b"") + values.tobytes()).hexdigest()
        places = {PLACES_KEY: before[PLACES_KEY]} if PLACES_KEY in before else {}
        writer.add_key_value_metadata({CONTENT: content, **places})
    return sink.getvalue().to_pybytes()
