"""Defines and checks the contents of `checkpoint.json`, so that no reader meets a place outside its shards or an unknown type."""

from __future__ import annotations

import math
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from heliostat.checkpoint.checksums import BLOCK
from heliostat.checkpoint.element_types import BYTES
from heliostat.data import plans
from heliostat.errors import DataError
from heliostat.records import Format, Hex, Number, Whole, open_

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # of a file in the checkpoint's own folder


@open_
class Shard(TypedDict):
    file: Name
    bytes: Whole


@open_
class Chunk(TypedDict):
    shard: Whole
    start: Whole
    numel: Whole
    offset: Whole
    crc32: list[Whole]


@open_
class Tensor(TypedDict):
    dtype: str
    shape: list[Whole]
    chunks: list[Chunk]


@open_
class Receipt(TypedDict):
    steps: Whole
    chain: Hex


@open_
class Files(TypedDict):
    """Describes the index of any folder of tensors, including that of frozen parameters."""

    format: int
    shards: list[Shard]
    tensors: dict[str, Tensor]


@open_
class Index(Files):
    step: Whole
    receipt: Receipt
    data_digest: str
    frozen: NotRequired[Name]
    name: str
    job: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, float | None]
    written: Number
    world_size: Whole
    zero_stage: Whole
    optimizer_steps: Whole
    bad_samples: Whole


FILES, INDEX = Format(Files, "index"), Format(Index, "index")


def fault(index: Any, step: int | None) -> str:
    """Finds what is wrong with the index of a step's checkpoint, or of a folder of frozen parameters; empty if nothing is."""
    try:
        found: Files = FILES.build(index, "it")
        if step is not None:
            whole = INDEX.build(index, "it")
            plans.build(whole["data"], "data")
            if whole["step"] != step:
                return f"step: it is of step {whole['step']}"
    except DataError as e:
        return str(e)
    for name, tensor in found["tensors"].items():
        if said := _tensor_fault(tensor, found["shards"]):
            return f"tensors: {name[:200]!r}: {said}"
    return ""


def _tensor_fault(tensor: Tensor, shards: list[Shard]) -> str:
    if tensor["dtype"] not in BYTES:
        return f"dtype {tensor['dtype'][:20]!r} is none"
    size, numel = BYTES[tensor["dtype"]], math.prod(tensor["shape"])
    end = 0
    for chunk in sorted(tensor["chunks"], key=lambda c: c["start"]):
        if chunk["start"] != end:
            return f"elements {end} to {chunk['start']} are in no chunk, or in two"
        end += chunk["numel"]
        if chunk["shard"] >= len(shards) or chunk["offset"] + chunk["numel"] * size > shards[chunk["shard"]]["bytes"]:
            return "a chunk lies outside its shard"
        if len(chunk["crc32"]) != -(-chunk["numel"] * size // BLOCK):
            return "a chunk has not one CRC-32 for each of its blocks"
    return "" if end == numel else f"its chunks hold {end} of {numel} elements"
