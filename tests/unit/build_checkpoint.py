"""Writes checkpoints of several ranks from one process, in the current format and in older ones."""

from __future__ import annotations

import json
import zlib
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from heliostat.checkpoint import layout, placement, writing
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.storage.locations import Location

from tests.unit.build_index import facts


def slices(tensors: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """Returns the part of each flat tensor that belongs to a rank."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        per = -(-len(tensor) // world)
        start = min(per * rank, len(tensor))
        out[name] = FlatShard(tensor[start : start + per].clone(), start, len(tensor))
    return out


def save(run: Location, step: int, states: list[dict[str, torch.Tensor]], **given: Any) -> Path:
    """Writes the shard of each rank; returns the folder."""
    target, world = layout.folder(run, step), len(states)
    parts = [
        writing.write_shard(target, writing.mine(state, rank, world), rank, lambda: None) for rank, state in enumerate(states)
    ]
    writing.finish(target, step, facts(optimizer_steps=step, **given), reduce(placement.merge, parts), None)
    return Path(target.path)


def age(folder: Path, number: int) -> None:
    """Converts the checkpoint to format 2 or 3: `checkpoint.json` lists every chunk of every shard, and there is no other
    index."""
    root = json.loads((folder / "checkpoint.json").read_bytes())
    del root["crc32"]
    root["format"] = number
    for entry in root["tensors"].values():
        del entry["runs"]
        entry["chunks"] = []
    for shard, told in enumerate(root["shards"]):
        del told["index"]
        index = (folder / told["file"]).with_suffix(".json")
        for name, place in json.loads(index.read_bytes())["tensors"].items():
            root["tensors"][name]["chunks"].append({"shard": shard, **place})
        index.unlink()
    body = json.dumps(root)[:-1].encode()
    (folder / "checkpoint.json").write_bytes(body + b', "crc32": "%08x"}' % zlib.crc32(body))
