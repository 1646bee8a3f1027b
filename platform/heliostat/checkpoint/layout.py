"""Defines the layout of a checkpoint in storage: a folder such as `checkpoints/step-00000100`.

`checkpoint.json` is written last, and makes the folder valid. This file lists every shard and every shard's index, with their
sizes. The file also records which shards hold which elements of each tensor (`placement`). Its last entry is the CRC-32 of all
bytes before this entry. A shard's index (`index`) lists the place of each chunk of elements in the shard, and a CRC-32 for each
block of a chunk.

A checkpoint is unusable if `checkpoint.json` is missing or damaged, or if a shard or an index is missing or has the wrong size.
Readers detect damage inside an index or a shard before they use any of its data. All these faults raise CorruptCheckpointError;
use the previous checkpoint then.

Frozen parameters are in a folder of the same form, `checkpoints/frozen-<digest>`. Every checkpoint of the run refers to this
folder. If the folder is incomplete, no other checkpoint helps, so a CheckpointError ends the run.
"""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from heliostat.checkpoint import checksums, columns, placement
from heliostat.checkpoint import index as indexes
from heliostat.checkpoint.columns import ROWS, Columns
from heliostat.checkpoint.index import CheckpointIndex, Places, TensorIndex
from heliostat.checkpoint.placement import ChunkPlace, Tensor
from heliostat.config.averages import EMA
from heliostat.config.spec import Checkpoint as Policy
from heliostat.config.spec import Job
from heliostat.data import device_threads
from heliostat.data.dataset import DataPlan
from heliostat.errors import CheckpointError, ConfigError, CorruptCheckpointError, DataError
from heliostat.schema import validate
from heliostat.storage import run_folder, wire
from heliostat.storage.locations import Location
from heliostat.text import brief

if TYPE_CHECKING:  # torch takes seconds to import, and finding a run's checkpoints works without it
    import torch

log = logging.getLogger(__name__)

INDEX = "checkpoint.json"
FORMAT = 4
IN_COLUMNS = 5  # like format 4, but tensors are in the order of their columns; readers of format 4 would misread them
READABLE = (2, 3, 4, 5)  # 2 had no frozen parameters; 3 listed every chunk in `checkpoint.json`
FROZEN: Final = "frozen"  # prefix of the names of frozen tensors
READ_THREADS = 8
PIECE = 64 * checksums.BLOCK  # maximum bytes in memory when a tensor is read as a stream


def folder(run: Location, step: int) -> Location:
    return run_folder.checkpoint(run, step)


def steps(run: Location) -> list[int]:
    """Lists the steps that have a checkpoint folder, complete or not, in ascending order."""
    names = run.join(run_folder.CHECKPOINTS).folders()
    return [int(n.removeprefix("step-")) for n in names if n.startswith("step-") and n[5:].isdigit()]


wire.travels(Location)


def is_average(name: str) -> bool:
    """Returns whether a tensor belongs to an average of the weights."""
    return name.startswith((f"{EMA}.", f"{EMA}-"))


@wire.travels
@dataclass(frozen=True)
class SavedCheckpoint:
    """Holds a complete checkpoint: its folder and its index (`checkpoint.json`). `frozen`: the folder of its frozen parameters.

    `places`: the places of chunks, by shard, for the shards whose index was already read. Other indexes are read when needed.
    """

    location: Location
    index: CheckpointIndex
    frozen: SavedCheckpoint | None = None
    places: dict[int, Places] = field(default_factory=dict, repr=False, compare=False)

    @property
    def job(self) -> Job:
        """Returns the job that wrote the checkpoint. Raises CheckpointError if this version of heliostat can't read the job."""
        try:
            return validate(Job, self.index.job, f"{self.location.join(INDEX)}: job")
        except ConfigError as e:
            raise CheckpointError(str(e)) from e

    @property
    def policy(self) -> Policy:
        """Returns the retention policy of the checkpoint's job."""
        return validate(Policy, self.index.job.get("checkpoint"), f"{self.location.join(INDEX)}: job.checkpoint")

    @property
    def plan(self) -> DataPlan:
        """Returns the data plan that the checkpoint's run follows."""
        return DataPlan.parse(self.index.data, f"{self.location.join(INDEX)}: data")

    @property
    def step(self) -> int:
        return self.index.step

    @property
    def tensors(self) -> placement.Tensors:
        """Returns the index entries of all readable tensors by name, including frozen parameters."""
        return {**self.index.tensors, **(self.frozen.tensors if self.frozen else {})}

    def names(self, prefix: str) -> list[str]:
        """Lists the names of the tensors that begin with `prefix.`, without the prefix."""
        return [n.removeprefix(prefix + ".") for n in self.tensors if n.startswith(prefix + ".")]

    @property
    def averages(self) -> list[str]:
        """Lists the kinds of the averages of the weights, such as `ema`. Evaluations and exports use the first kind."""
        return sorted({n.partition(".")[0] for n in self.index.tensors if is_average(n)})

    def order(self, name: str) -> Columns:
        """Returns the order of a tensor's elements in the shards."""
        return self.holder(name).index.tensors[name].columns

    def holder(self, name: str) -> SavedCheckpoint:
        """Returns the checkpoint whose shards hold a tensor: this checkpoint, or its folder of frozen parameters."""
        return self.frozen if self.frozen and name in self.frozen.index.tensors else self

    def fault(self, what: str) -> CheckpointError:
        """Builds the error for damage in this checkpoint."""
        return _fault(what, getattr(self.index, "step", None))

    def slices(self, name: str, first: int, target: torch.Tensor) -> list[tuple[int, checksums.Slice]]:
        """Locates the elements of a tensor that belong into `target`, from element `first` on; returns (shard, slice) for each
        chunk.

        `target`: a contiguous tensor. Reads the indexes of the shards that hold the elements. Raises CheckpointError if the
        target's dtype differs from the stored dtype.
        """
        dtype, stop = self._size(name)[1], first + target.numel()
        if target.dtype != dtype:  # bytes of another dtype would be misread as numbers
            raise CheckpointError(f"{self.location}: {name!r} has dtype {dtype}, so this tensor can't be read as {target.dtype}")
        flat, size, out = target.reshape(-1), dtype.itemsize, []
        for chunk in placement.chunks(self.index.tensors[name].runs, first, stop):
            low, high = max(first, chunk.start), min(stop, chunk.start + chunk.numel)
            part, place = checksums.as_bytes(flat[low - first : high - first]), self._place(name, chunk)
            cut = checksums.Slice(place.offset, chunk.numel * size, place.crc32, (low - chunk.start) * size, part)
            out.append((chunk.shard, cut))
        return out

    def _place(self, name: str, chunk: placement.Chunk) -> ChunkPlace:
        if chunk.shard not in self.places:
            self.fetch_places([chunk.shard])
        place = self.places[chunk.shard].get((name, chunk.start))
        if place is None or place.numel != chunk.numel:
            file = self.location.join(indexes.shard_name(self.index.shards[chunk.shard].file))
            raise self.fault(f"{file}: lacks the elements of {name!r} that {INDEX} lists for this file")
        return place

    def needed(self, name: str, first: int, numel: int) -> set[int]:
        """Returns the shards that hold a tensor's elements [first, first + numel)."""
        return {c.shard for c in placement.chunks(self.index.tensors[name].runs, first, first + numel)}

    def fetch_places(self, shards: Iterable[int]) -> None:
        """Reads the indexes of shards that weren't read yet, several in parallel.

        Raises CheckpointError if an index is damaged.
        """
        if not (missing := [shard for shard in shards if shard not in self.places]):
            return
        with device_threads.pool(min(READ_THREADS, len(missing))) as pool:
            self.places.update(zip(missing, pool.map(self._read_places, missing), strict=True))

    def _read_places(self, number: int) -> Places:
        shard = self.index.shards[number]
        file = self.location.join(indexes.shard_name(shard.file))
        try:
            return indexes.decode_shard(file.read(), shard, self.index.tensors)
        except (OSError, ValueError) as e:
            said = f"can't be read ({brief(e)})" if isinstance(e, OSError) else str(e)
            raise self.fault(f"{file}: {said}") from e

    def fill(self, wanted: list[tuple[int, checksums.Slice]], progressed: Callable[[], None] = lambda: None) -> int:
        """Reads slices from the shards into their targets, several in parallel; returns the number of bytes read.

        Calls `progressed` after each request, from several threads.
        """
        by_shard: dict[int, list[checksums.Slice]] = {}
        for shard, part in wanted:
            by_shard.setdefault(shard, []).append(part)
        jobs = []
        for shard, parts in by_shard.items():
            reads = checksums.runs(parts)
            ways = min(-(-READ_THREADS // len(by_shard)), len(reads))
            jobs += [(shard, reads[i::ways]) for i in range(ways)]
        with device_threads.pool(READ_THREADS) as pool:
            return sum(pool.map(lambda job: self._read(job[0], job[1], progressed), jobs))

    def _read(self, shard: int, wanted: list[list[checksums.Block]], progressed: Callable[[], None]) -> int:
        location = self.location.join(self.index.shards[shard].file)

        def read() -> tuple[int, checksums.Block | None]:
            with location.open() as file:
                return checksums.read(file, wanted, progressed)

        try:
            total, damaged = location.attempt(read)
        except OSError as e:
            raise self.fault(f"{location}: can't read this shard ({brief(e)})") from e
        if damaged:
            where = f"bytes {damaged.offset} to {damaged.offset + damaged.size}"
            raise self.fault(f"{location}: {where} have changed since they were written (CRC-32)")
        return total

    def _size(self, name: str) -> tuple[int, torch.dtype]:
        """Returns the number of elements, and the dtype, of a tensor in this folder."""
        from heliostat.checkpoint.safetensors_file import DTYPES

        entry = self.index.tensors[name]
        return math.prod(entry.shape), DTYPES[entry.dtype]

    def numel(self, name: str) -> int:
        """Returns the number of elements of a tensor in this folder."""
        return self._size(name)[0]

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """Yields a flat tensor in its own order, assembled from the slices of all ranks, in pieces of at most 64 MiB."""
        if (holder := self.holder(name)) is not self:
            yield from holder.stream(name)
            return
        import torch

        numel, dtype = self._size(name)
        for first in range(0, numel, PIECE // dtype.itemsize):
            piece = torch.empty(min(PIECE // dtype.itemsize, numel - first), dtype=dtype)
            self.read_into(name, ROWS, first, piece)
            yield piece

    def read_into(
        self, name: str, order: Columns, first: int, target: torch.Tensor, progressed: Callable[[], None] = lambda: None
    ) -> int:
        """Reads a tensor's elements from `first` on, in the given order, into a contiguous target; returns the number of bytes
        read.
        """
        total, numel = 0, self._size(name)[0]

        def read(start: int, part: torch.Tensor) -> None:
            nonlocal total
            total += self.fill(self.slices(name, start, part), progressed)

        if (stored := self.order(name)) == order:
            self.fetch_places(self.needed(name, first, target.numel()))
            read(first, target)
        else:
            self.fetch_places(self.needed(name, 0, numel))
            columns.collect(read, stored, order, numel, first, target, PIECE // 8)
        return total

    def read(self, name: str) -> torch.Tensor:
        """Reads a complete tensor, flat and in its own order."""
        if (holder := self.holder(name)) is not self:
            return holder.read(name)
        import torch

        numel, dtype = self._size(name)
        out = torch.empty(numel, dtype=dtype)
        self.read_into(name, ROWS, 0, out)
        return out


def format_of(tensors: Mapping[str, Tensor]) -> int:
    """Returns the format of an index with these tensors."""
    return IN_COLUMNS if any(entry.columns != ROWS for entry in tensors.values()) else FORMAT


def encode(index: Mapping[str, object]) -> bytes:
    """Encodes an index as the bytes of `checkpoint.json`. The last entry is a CRC-32 of all bytes before this entry."""
    body = indexes.encode(index)[:-1]
    return body + b', "crc32": "%08x"}' % zlib.crc32(body)


def decode(data: bytes) -> object:
    """Decodes the bytes of `checkpoint.json`. Raises ValueError if the bytes aren't exactly as `encode` wrote them."""
    body, mark, rest = data.rpartition(b', "crc32": "')
    if not mark or rest != b'%08x"}' % zlib.crc32(body):
        raise ValueError("damaged")
    return json.loads(data)


def _fault(what: str, step: int | None) -> CheckpointError:
    if step is not None:
        return CorruptCheckpointError(what, step)
    return CheckpointError(f"{what}. Every checkpoint of the run needs this file. Restore the file from a copy")


def open_checkpoint(run: Location, step: int) -> SavedCheckpoint:
    """Opens the checkpoint of a step.

    Raises CorruptCheckpointError with the reason if the checkpoint is incomplete or damaged.
    """
    checkpoint = open_folder(folder(run, step), step)
    if name := checkpoint.index.frozen:
        frozen = open_folder(run.join(run_folder.CHECKPOINTS, name), None)
        return SavedCheckpoint(checkpoint.location, checkpoint.index, frozen, checkpoint.places)
    return checkpoint


def open_folder(location: Location, step: int | None) -> SavedCheckpoint:
    """Opens a folder of tensors and checks that it is complete. `step`: None for a folder of frozen parameters."""
    try:
        raw = decode(location.join(INDEX).read())
    except FileNotFoundError as e:
        raise _fault(f"{location}: no complete checkpoint here ({INDEX} is missing)", step) from e
    except ValueError as e:
        raise _fault(f"{location.join(INDEX)}: its bytes have changed since they were written (CRC-32)", step) from e
    if isinstance(raw, dict) and raw.get("format") not in READABLE:
        what = f"format {brief(raw.get('format'))} isn't supported by this version of heliostat"
        raise CheckpointError(f"{location}: {what} ({', '.join(map(str, READABLE))}). Use a newer heliostat")
    try:
        index, places = indexes.upgrade(indexes.build(raw, step))
    except DataError as e:  # the checksum is right: the file isn't damaged, but from another tool or a newer heliostat
        raise CheckpointError(f"{location.join(INDEX)}: isn't an index that this version of heliostat can read ({e})") from e
    present = dict(location.files())
    for file, size in files(index):
        if present.get(file) != size:
            raise _fault(f"{location.join(file)}: expected {size} bytes, found {present.get(file, 'none')}", step)
    return SavedCheckpoint(location, cast("CheckpointIndex", index), places=places)


def files(index: TensorIndex) -> Iterator[tuple[str, int]]:
    """Yields the files that an index lists, with their sizes: each shard, and the shard's index if there is one."""
    for shard in index.shards:
        yield shard.file, shard.bytes
        if shard.index:
            yield indexes.shard_name(shard.file), shard.index.bytes


def latest(run: Location, before: int | None = None) -> SavedCheckpoint | None:
    """Returns the newest complete checkpoint, or the newest complete checkpoint before step `before`.

    Logs a warning for each incomplete checkpoint.
    """
    for step in reversed(steps(run)):
        if before is None or step < before:
            try:
                return open_checkpoint(run, step)
            except CorruptCheckpointError as e:
                log.warning("%s. Using the previous checkpoint", e)
    return None
