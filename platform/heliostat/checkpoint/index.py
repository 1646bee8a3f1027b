"""Defines and checks the contents of `checkpoint.json`, so that no reader meets a place outside its shards or an unknown type.

Since format 4 it says of every tensor which shards hold which elements (`placement`), and where a chunk's bytes are stands in the
index of its shard (`shard_index`). Format 5 has tensors in the order of their `columns`. Formats 2 and 3 listed every chunk of
every shard here: `upgrade` makes the newest of them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from heliostat.checkpoint import placement, shard_index
from heliostat.checkpoint.element_types import BYTES
from heliostat.data import plans
from heliostat.errors import DataError
from heliostat.storage.records import Format, Hex, Number, Whole, open_

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # of a file in the checkpoint's own folder


@open_
class Sealed(TypedDict):
    """Describes the file of a shard's index."""

    bytes: Whole
    crc32: Whole


@open_
class Shard(TypedDict):
    file: Name
    bytes: Whole
    index: NotRequired[Sealed]  # since format 4


@open_
class Chunk(TypedDict):
    """Describes a chunk as formats 2 and 3 have it."""

    shard: Whole
    start: Whole
    numel: Whole
    offset: Whole
    crc32: list[Whole]


@open_
class Tensor(TypedDict):
    dtype: str
    shape: list[Whole]
    runs: NotRequired[list[Annotated[list[Whole], Field(min_length=4, max_length=4)]]]
    columns: NotRequired[Annotated[list[Whole], Field(min_length=2, max_length=2)]]  # since format 5
    chunks: NotRequired[list[Chunk]]


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
LISTED = (2, 3)  # the formats whose index lists every chunk


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
    listed = found["format"] in LISTED
    if not listed and any("index" not in shard for shard in found["shards"]):
        return "shards: one has no index"
    for name, tensor in found["tensors"].items():
        if said := _tensor_fault(tensor, found["shards"], listed):
            return f"tensors: {name[:200]!r}: {said}"
    return ""


def _tensor_fault(tensor: Tensor, shards: list[Shard], listed: bool) -> str:
    if tensor["dtype"] not in BYTES:
        return f"dtype {tensor['dtype'][:20]!r} is none"
    if ("chunks" if listed else "runs") not in tensor:
        return f"has no {'chunks' if listed else 'runs'}"
    if said := _columns_fault(tensor):
        return said
    runs = _runs(tensor["chunks"]) if listed else tensor["runs"]
    if said := placement.fault({**tensor, "runs": runs}, len(shards)):
        return said
    size = BYTES[tensor["dtype"]]
    places = tensor["chunks"] if listed else []
    return next((f for c in places if (f := shard_index.place_fault(c, size, shards[c["shard"]]["bytes"]))), "")


def _columns_fault(tensor: Tensor) -> str:
    if "columns" not in tensor:
        return ""
    parts, width = tensor["columns"]
    fits = parts > 1 and width and width % parts == 0 and math.prod(tensor["shape"]) % width == 0
    return "" if fits else f"it has no {parts} blocks of columns in rows of {width} elements"


def upgrade(index: dict[str, Any]) -> tuple[dict[str, Any], dict[int, shard_index.Places]]:
    """Returns an index of any format in the newest's form, and the places in each shard where the index itself lists them."""
    places: dict[int, shard_index.Places] = {}
    if index["format"] not in LISTED:
        return index, places
    tensors = {}
    for name, entry in index["tensors"].items():
        tensors[name] = {**{k: v for k, v in entry.items() if k != "chunks"}, "runs": _runs(entry["chunks"])}
        for chunk in entry["chunks"]:
            places.setdefault(chunk["shard"], {})[name, chunk["start"]] = chunk
    return {**index, "tensors": tensors}, places


def _runs(chunks: list[Any]) -> list[placement.Run]:
    ordered = sorted(chunks, key=lambda c: c["start"])
    return placement.runs(placement.Chunk(c["shard"], c["start"], c["numel"]) for c in ordered)
