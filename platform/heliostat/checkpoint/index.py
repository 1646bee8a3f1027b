"""Defines and checks the contents of `checkpoint.json`, so that no reader meets a place outside its shards or an unknown type.

Since format 4 it says of every tensor which shards hold which elements (`placement`), and where a chunk's bytes are stands in the
index of its shard (`shard_index`). Format 5 has tensors in the order of their `columns`. Formats 2 and 3 listed every chunk of
every shard here: `upgrade` makes the newest of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from heliostat.checkpoint import placement, shard_index
from heliostat.checkpoint.placement import BYTES, ListedChunk, Name, Shard, Tensor, Tensors
from heliostat.data import plans
from heliostat.errors import CheckpointError, DataError
from heliostat.storage.records import Format, Hex, Number, Whole, open_


@open_
class Receipt(TypedDict):
    steps: Whole
    chain: Hex


@open_
class Files(TypedDict):
    """Describes the index of any folder of tensors, including that of frozen parameters."""

    format: int
    shards: list[Shard]
    tensors: Tensors


@open_
class CheckpointIndex(Files):
    step: Whole
    receipt: Receipt
    data_digest: str
    frozen: NotRequired[Name]
    name: str
    job: dict[str, Any]
    data: dict[str, object]
    metrics: dict[str, float | None]
    written: Number
    world_size: Whole
    zero_stage: Whole
    optimizer_steps: Whole
    loss_scale: NotRequired[dict[str, float] | None]
    bad_samples: Whole


FILES, INDEX = Format(Files, "index"), Format(CheckpointIndex, "index")
LISTED = (2, 3)  # the formats whose index lists every chunk


def fault(index: object, step: int | None) -> str:
    """Finds what is wrong with the index of a step's checkpoint, or of a folder of frozen parameters; empty if nothing is."""
    try:
        listing: Files = FILES.build(index, "it")
        if step is not None:
            whole = INDEX.build(index, "it")
            plans.build(whole["data"], "data")
            if whole["step"] != step:
                return f"step: it is of step {whole['step']}"
    except DataError as e:
        return str(e)
    listed = listing["format"] in LISTED
    if not listed and any("index" not in shard for shard in listing["shards"]):
        return "shards: one has no index"
    for name, tensor in listing["tensors"].items():
        if said := _tensor_fault(tensor, listing["shards"], listed):
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


def upgrade(index: CheckpointIndex) -> tuple[CheckpointIndex, dict[int, shard_index.Places]]:
    """Returns an index of any format in the newest's form, and the places in each shard where the index itself lists them."""
    places: dict[int, shard_index.Places] = {}
    if index["format"] not in LISTED:
        return index, places
    tensors = Tensors()
    for name, entry in index["tensors"].items():
        tensors[name] = {**cast(Tensor, {k: v for k, v in entry.items() if k != "chunks"}), "runs": _runs(entry["chunks"])}
        for chunk in entry["chunks"]:
            places.setdefault(chunk["shard"], {})[name, chunk["start"]] = chunk
    return {**index, "tensors": tensors}, places


def _runs(chunks: list[ListedChunk]) -> list[placement.Run]:
    ordered = sorted(chunks, key=lambda c: c["start"])
    return placement.runs(placement.Chunk(c["shard"], c["start"], c["numel"]) for c in ordered)


def root(step: int | None, facts: Mapping[str, object], whole: placement.WrittenPart) -> CheckpointIndex:
    """Builds the contents of `checkpoint.json`; CheckpointError if the ranks' slices leave elements out, or overlap."""
    for name, entry in whole.tensors.items():
        if said := placement.fault(entry, len(whole.shards)):
            raise CheckpointError(f"{name!r} cannot be saved: {said}")
    return cast("CheckpointIndex", {**facts, "step": step, "shards": whole.shards, "tensors": whole.tensors})
