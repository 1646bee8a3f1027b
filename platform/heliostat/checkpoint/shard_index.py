"""Defines the index of one shard, `shard-00000.json` beside `shard-00000.safetensors`: its chunks' places and checksums.

It lists each tensor's chunk in the shard: the elements, the bytes, and a CRC-32 of each block of them (`checksums`). It is
written before `checkpoint.json`, which has its size and its CRC-32, and is read only by those who read from the shard.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

from typing_extensions import TypedDict

from heliostat.checkpoint.checksums import BLOCK
from heliostat.checkpoint.placement import BYTES, ListedChunk, SealedIndex, Shard, Tensor
from heliostat.errors import DataError
from heliostat.storage.records import Format, Whole, open_


@open_
class ChunkPlace(TypedDict):
    """Describes where the elements of a chunk lie in its shard's file, and the CRC-32 of each block of their bytes."""

    start: Whole
    numel: Whole
    offset: Whole
    crc32: list[Whole]


@open_
class Listing(TypedDict):
    tensors: dict[str, ChunkPlace]


Places = dict[tuple[str, int], ChunkPlace]  # by tensor and first element
LISTING = Format(Listing, "index of a shard")


def name(shard: str) -> str:
    """Returns the name of the index of a shard's file."""
    return f"{shard.removesuffix('.safetensors')}.json"


def encode(places: Mapping[str, ChunkPlace]) -> bytes:
    return json.dumps({"tensors": places}).encode()


def seal(data: bytes) -> SealedIndex:
    """Computes what `checkpoint.json` says of a shard's index."""
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def decode(data: bytes, shard: Shard, tensors: Mapping[str, Tensor]) -> Places:
    """Decodes the index of a shard, which `checkpoint.json` describes; ValueError unless it is what was written, and fits."""
    sealed = shard["index"]
    if seal(data) != {"bytes": sealed["bytes"], "crc32": sealed["crc32"]}:
        raise ValueError("is not what was written (CRC-32)")
    try:
        places = LISTING.parse(data, "it")["tensors"]
    except DataError as e:
        raise ValueError(str(e)) from e
    for tensor, place in places.items():
        if tensor not in tensors:
            raise ValueError(f"{tensor[:200]!r} is no tensor of the checkpoint")
        if said := place_fault(place, BYTES[tensors[tensor]["dtype"]], shard["bytes"]):
            raise ValueError(f"{tensor[:200]!r}: {said}")
    return {(tensor, place["start"]): place for tensor, place in places.items()}


def place_fault(place: ChunkPlace | ListedChunk, itemsize: int, shard_bytes: int) -> str:
    """Finds what is wrong with a chunk's place in its shard; empty if nothing is."""
    size = place["numel"] * itemsize
    if place["offset"] + size > shard_bytes:
        return "a chunk lies outside its shard"
    return "" if len(place["crc32"]) == -(-size // BLOCK) else "a chunk has not one CRC-32 for each of its blocks"
