"""Defines and checks the contents of `checkpoint.json`, and of each shard's index, such as `shard-00000.json`.

Because of these checks, the values that readers get have known types, and all places are inside the shards.

Since format 4, `checkpoint.json` records for every tensor which shards hold which elements (`placement`). A shard's index
records the byte range of each chunk, and a CRC-32 for each of the chunk's blocks (`checksums`). The index is written before
`checkpoint.json`, which records the index's size and CRC-32. Only readers of the shard read its index. In format 5, tensors are
in the order of their `columns`. In formats 2 and 3, `checkpoint.json` lists every chunk of every shard. `upgrade` converts
these formats to the newest form.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from heliostat.checkpoint import placement
from heliostat.checkpoint.checksums import BLOCK
from heliostat.checkpoint.columns import ROWS
from heliostat.checkpoint.placement import BYTES, Chunk, ChunkPlace, Name, SealedIndex, Shard, Tensor, Tensors
from heliostat.data.dataset import DataPlan
from heliostat.errors import CheckpointError, DataError
from heliostat.storage import wire
from heliostat.storage.records import Format, Hex, Number, Whole

LISTED = (2, 3)  # formats in which `checkpoint.json` lists every chunk
Places = dict[tuple[str, int], ChunkPlace]  # places of a shard's chunks, by (tensor, first element)


@wire.travels
@dataclass(frozen=True)
class CheckpointReceipt:
    """Describes the receipt of the steps up to a checkpoint."""

    steps: Whole
    chain: Hex


@wire.travels
@dataclass(frozen=True)
class TensorIndex:
    """Describes a folder of tensors: a checkpoint, or frozen parameters."""

    format: int
    shards: list[Shard]
    tensors: Tensors


@wire.travels
@dataclass(frozen=True)
class CheckpointIndex(TensorIndex):
    """Describes the checkpoint of a step.

    `base`: the digest of the pretrained model whose adapter the checkpoint contains; None if the checkpoint contains a model.
    `resume`: all keys that this class doesn't declare. The worker that resumes declares and checks them
    (`training.worker.training_state.ResumeFacts`).
    """

    step: Whole
    receipt: CheckpointReceipt
    data_digest: str
    name: str
    job: dict[str, Any]
    data: dict[str, object]
    metrics: dict[str, float | None]
    written: Number
    world_size: Whole
    zero_stage: Whole
    bad_samples: Whole
    frozen: Name | None = None
    base: Hex | None = None
    resume: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardIndex:
    """Describes the index of a shard: its chunks, by tensor."""

    tensors: dict[str, ChunkPlace]


TENSORS, INDEX = Format(TensorIndex, "index"), Format(CheckpointIndex, "index")
SHARD_INDEX = Format(ShardIndex, "index of a shard")
DECLARED = frozenset(f.name for f in fields(CheckpointIndex)) - {"resume"}


def build(raw: object, step: int | None) -> TensorIndex:
    """Builds the index of a step's checkpoint, or of frozen parameters if `step` is None.

    Raises DataError, with the reason, if the index is invalid.
    """
    if step is not None and isinstance(raw, dict):
        raw = {**raw, "resume": {key: value for key, value in raw.items() if key not in DECLARED}}
    index = (TENSORS if step is None else INDEX).build(raw, "it")
    if isinstance(index, CheckpointIndex):
        DataPlan.parse(index.data, "data")
        if index.step != step:
            raise DataError(f"step: expected {step}, but the index is for step {index.step}")
    listed = index.format in LISTED
    if not listed and any(shard.index is None for shard in index.shards):
        raise DataError("shards: a shard has no index")
    for name, tensor in index.tensors.items():
        if fault := _fault(tensor, index.shards, listed):
            raise DataError(f"tensors: {name[:200]!r}: {fault}")
    return index


def _fault(tensor: Tensor, shards: list[Shard], listed: bool) -> str:
    """Describes the fault in a tensor's entry; returns an empty string if the entry is valid."""
    if tensor.dtype not in BYTES:
        return f"unknown dtype {tensor.dtype[:20]!r}"
    if listed != (tensor.chunks is not None):  # chunks are checked and used only in formats that list them
        return "has no chunks" if listed else f"lists chunks, but only the formats {LISTED[0]} and {LISTED[1]} list chunks"
    if tensor.columns != ROWS:
        parts, width = tensor.columns
        if parts < 2 or width < 1 or width % parts or math.prod(tensor.shape) % width:
            return f"can't have {parts} blocks of columns in rows of {width} elements"
    if fault := placement.fault(_in_runs(tensor), len(shards)):
        return fault
    places = tensor.chunks or [] if listed else []
    return next((f for c in places if (f := _place_fault(c, BYTES[tensor.dtype], shards[c.shard].bytes))), "")


def _in_runs(tensor: Tensor) -> Tensor:
    """Converts a tensor's entry from any format to the newest format."""
    if tensor.chunks is None:
        return tensor
    ordered = sorted(tensor.chunks, key=lambda c: c.start)
    return replace(tensor, runs=placement.runs(Chunk(c.shard, c.start, c.numel) for c in ordered), chunks=None)


def upgrade(index: TensorIndex) -> tuple[TensorIndex, dict[int, Places]]:
    """Converts an index of any format to the newest form.

    Also returns the places of chunks by shard, if the index lists chunks.
    """
    places: dict[int, Places] = {}
    for name, tensor in index.tensors.items():
        for chunk in tensor.chunks or ():
            places.setdefault(chunk.shard, {})[name, chunk.start] = chunk
    return replace(index, tensors={name: _in_runs(tensor) for name, tensor in index.tensors.items()}), places


def root(step: int | None, facts: Mapping[str, object], whole: placement.WrittenPart) -> dict[str, object]:
    """Builds the contents of `checkpoint.json`. Raises CheckpointError if the ranks' slices overlap, or leave out elements."""
    for name, entry in whole.tensors.items():
        if fault := placement.fault(entry, len(whole.shards)):
            raise CheckpointError(f"can't save {name!r}: {fault}")
    return {**facts, "step": step, "shards": whole.shards, "tensors": whole.tensors}


def encode(contents: Mapping[str, object]) -> bytes:
    """Encodes the contents of an index. Fields of records that have their default value are left out."""
    return json.dumps(contents, default=_plain).encode()


def _plain(record: object) -> dict[str, object]:
    assert is_dataclass(record)
    values = {f.name: (getattr(record, f.name), f.default) for f in fields(record)}
    return {name: value for name, (value, default) in values.items() if value != default}


# the index of a shard ------------------------------------------------------------------------------------------------


def shard_name(shard: str) -> str:
    """Returns the name of the file with a shard's index."""
    return f"{shard.removesuffix('.safetensors')}.json"


def seal(data: bytes) -> SealedIndex:
    """Computes the size and CRC-32 that `checkpoint.json` records for a shard's index."""
    return SealedIndex(len(data), zlib.crc32(data))


def decode_shard(data: bytes, shard: Shard, tensors: Mapping[str, Tensor]) -> Places:
    """Decodes a shard's index.

    Raises ValueError if the index differs from the size or CRC-32 in `checkpoint.json`, or if the index doesn't fit the tensors.
    """
    if seal(data) != shard.index:
        raise ValueError("its bytes have changed since they were written (CRC-32)")
    try:
        places = SHARD_INDEX.parse(data, "it").tensors
    except DataError as e:
        raise ValueError(str(e)) from e
    for tensor, place in places.items():
        if tensor not in tensors:
            raise ValueError(f"{tensor[:200]!r} isn't a tensor of the checkpoint")
        if fault := _place_fault(place, BYTES[tensors[tensor].dtype], shard.bytes):
            raise ValueError(f"{tensor[:200]!r}: {fault}")
    return {(tensor, place.start): place for tensor, place in places.items()}


def _place_fault(place: ChunkPlace, itemsize: int, shard_bytes: int) -> str:
    """Describes the fault in a chunk's place in its shard; returns an empty string if the place is valid."""
    size = place.numel * itemsize
    if place.offset + size > shard_bytes:
        return "a chunk is outside its shard"
    return "" if len(place.crc32) == -(-size // BLOCK) else "a chunk doesn't have one CRC-32 per block"
