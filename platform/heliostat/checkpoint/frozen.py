"""Saves parameters that are not trained once per run, in a folder beside the checkpoints, which name it.

Their folder is `checkpoints/frozen-<digest>`, by the content that each rank holds. Every save checks their content again: if it
has changed, they are written anew, under another name. A resumed run keeps using the folder of the checkpoint that it loaded, on
any number of workers and in any precision, as long as the parameters are what was loaded.
"""

from __future__ import annotations

import hashlib
import operator
import zlib
from collections.abc import Callable, Mapping

from heliostat.checkpoint import checksums
from heliostat.checkpoint.agreement import first, merged
from heliostat.checkpoint.columns import ROWS
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.layout import FROZEN, INDEX, SavedCheckpoint
from heliostat.checkpoint.tree import Group
from heliostat.storage import run_folder
from heliostat.storage.locations import Location

PIECE = 64 * checksums.BLOCK  # bytes on their way from the device at a time


class Keeper:
    """Keeps one worker's parameters that are not trained; all workers of the group make the same calls in the same order."""

    def __init__(self, run: Location, group: Group, write: Callable[[Location, dict[str, FlatShard]], None]) -> None:
        """Prepares the keeper; `write` saves slices as a folder, together with the other workers."""
        self.run, self.group, self._write = run, group, write
        self._loaded = self._folder = ""

    def loaded(self, checkpoint: SavedCheckpoint, slices: dict[str, FlatShard]) -> None:
        """Notes that the slices were loaded from the checkpoint (perhaps cast): while they stay so, its folder is theirs."""
        if checkpoint.frozen:
            self._folder = checkpoint.frozen.location.name
            self._loaded = self._name(slices)

    def keep(self, slices: dict[str, FlatShard]) -> str | None:
        """Saves the slices as a folder unless it is there, and returns the folder's name; None if no worker has any slices."""
        any_ = merged(self.group, lambda: bool(slices), operator.or_)
        if not first(self.group, lambda: any_):
            return None
        name = self._name(slices)
        if name == self._loaded:
            name = self._folder
        place = self.run.join(run_folder.CHECKPOINTS, name)
        if not first(self.group, place.join(INDEX).exists):
            self._write(place, {n: s.holding(s.local.cpu()) for n, s in slices.items()})
        return name

    def _name(self, slices: dict[str, FlatShard]) -> str:
        parts = merged(self.group, lambda: [digest(slices)], operator.add)  # on rank 0
        return first(self.group, lambda: f"{FROZEN}-{hashlib.sha256(' '.join(parts or []).encode()).hexdigest()[:16]}")


def digest(slices: Mapping[str, FlatShard]) -> str:
    """Computes a digest of the slices that this rank holds: names, types, places and a CRC-32 of each piece."""
    told = hashlib.sha256()
    for name in sorted(slices):
        shard = slices[name]
        order = f" {shard.columns}" if shard.columns != ROWS else ""
        told.update(f"{name} {shard.dtype} {shard.shape[0]} {shard.start} {shard.local.numel()}{order}".encode())
        for piece in shard.local.split(PIECE // shard.local.element_size()):
            told.update(zlib.crc32(checksums.as_bytes(piece.cpu()).numpy().data).to_bytes(4, "big"))
    return told.hexdigest()
