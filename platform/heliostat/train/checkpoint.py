"""Checkpoints: safetensors shards through torch.distributed.checkpoint, made valid by `checkpoint.json`, written last.

A checkpoint is a folder `checkpoints/step-00000100` under the run's folder. Without `checkpoint.json`, or with a shard
missing or of another size, it does not exist, and the one before is used, with a warning. A rank reads only the byte ranges
it needs, at any ZeRO stage and world size (`fragments`). Nothing is ever unpickled.

`Saver.save` blocks for the copy to host memory only; writing and uploading run in one background thread, whose failure is
raised by the next call. At most one save is in flight: the next one waits for it.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.metadata import TensorStorageMetadata as TensorMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader

from heliostat.errors import CheckpointError
from heliostat.storage import Location
from heliostat.train.fragments import FlatShard

log = logging.getLogger(__name__)

INDEX = "checkpoint.json"
FORMAT = 1
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
READ_THREADS = 8


def folder(run: Location, step: int) -> Location:
    return run.join("checkpoints", f"step-{step:08d}")


def steps(run: Location) -> list[int]:
    """Steps that have a folder, whole or not, ascending."""
    names = run.join("checkpoints").folders()
    return [int(n.removeprefix("step-")) for n in names if n.startswith("step-") and n[5:].isdigit()]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and what `checkpoint.json` says."""

    location: Location
    index: dict[str, Any]

    @property
    def step(self) -> int:
        return self.index["step"]

    def names(self, prefix: str) -> list[str]:
        """Tensor names below `prefix.`, without it."""
        return [n.removeprefix(prefix + ".") for n in self.index["tensors"] if n.startswith(prefix + ".")]

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, flat, put together from every rank's slice."""
        entry = self.index["tensors"][name]
        numel, dtype = math.prod(entry["shape"]), DTYPES[entry["dtype"]]
        out = torch.empty(numel, dtype=dtype)
        for chunk in entry["chunks"]:
            with self.location.join(self.index["shards"][chunk["shard"]]["file"]).open() as f:
                data = f.read_at(chunk["numel"] * dtype.itemsize, chunk["offset"])
            out[chunk["start"] : chunk["start"] + chunk["numel"]] = torch.frombuffer(bytearray(data), dtype=dtype)
        return out


def open_checkpoint(run: Location, step: int) -> Checkpoint:
    """CheckpointError, saying why, unless the checkpoint of that step is complete."""
    location = folder(run, step)
    try:
        index = json.loads(location.join(INDEX).read())
    except FileNotFoundError as e:
        raise CheckpointError(f"{location}: no complete checkpoint here ({INDEX} is missing)") from e
    except ValueError as e:
        raise CheckpointError(f"{location.join(INDEX)}: not valid JSON") from e
    if index.get("format") != FORMAT:
        raise CheckpointError(f"{location}: format {index.get('format')!r} is not the one this version reads ({FORMAT})")
    present = dict(location.files())
    for shard in index["shards"]:
        if present.get(shard["file"]) != shard["bytes"]:
            found = present.get(shard["file"], "nothing")
            raise CheckpointError(f"{location.join(shard['file'])}: {shard['bytes']} bytes expected, {found} found")
    return Checkpoint(location, index)


def latest(run: Location) -> Checkpoint | None:
    """The newest complete checkpoint; torn ones are passed over with a warning."""
    for step in reversed(steps(run)):
        try:
            return open_checkpoint(run, step)
        except CheckpointError as e:
            log.warning("%s; using the checkpoint before", e)
    return None


def prune(run: Location, keep: int) -> None:
    """Deletes all but the `keep` newest complete checkpoints, and torn ones older than the newest complete one."""
    whole = []
    for step in reversed(steps(run)):
        if folder(run, step).join(INDEX).exists():
            whole.append(step)
            if len(whole) > keep:
                folder(run, step).join(INDEX).delete()  # first, so that a half-deleted checkpoint does not exist
                folder(run, step).delete()
        elif whole:
            folder(run, step).delete()


class _Reader(StorageReader):
    """DCP's reader over `checkpoint.json`: byte ranges from any storage, several files at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, dict[str, int]] = {}
        for name, entry in self.checkpoint.index["tensors"].items():
            flat = len(entry["chunks"]) > 1 or len(entry["shape"]) == 1
            chunks = []
            for chunk in entry["chunks"]:
                offsets = torch.Size([chunk["start"]]) if flat else torch.Size([0] * len(entry["shape"]))
                sizes = torch.Size([chunk["numel"]]) if flat else torch.Size(entry["shape"])
                chunks.append(ChunkStorageMetadata(offsets, sizes))
                places[MetadataIndex(name, offsets)] = chunk
            tensors[name] = TensorMetadata(TensorProperties(dtype=DTYPES[entry["dtype"]]), torch.Size(entry["shape"]), chunks)
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        by_shard: dict[int, list] = {}
        for item in plan.items:
            by_shard.setdefault(self.places[item.storage_index]["shard"], []).append(item)

        def read(shard: int) -> None:
            location = self.checkpoint.location.join(self.checkpoint.index["shards"][shard]["file"])
            with location.open() as f:
                for item in by_shard[shard]:
                    target = planner.resolve_tensor(item).detach()
                    skip = item.storage_offsets[0] if item.storage_offsets else 0
                    offset = self.places[item.storage_index]["offset"] + skip * target.element_size()
                    data = f.read_at(target.numel() * target.element_size(), offset)
                    target.copy_(torch.frombuffer(bytearray(data), dtype=target.dtype).view(target.shape))
                    planner.commit_tensor(item, target)

        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(read, by_shard))
        done: torch.futures.Future = torch.futures.Future()
        done.set_result(None)
        return done


def load(checkpoint: Checkpoint, state: dict[str, torch.Tensor], group: Any) -> None:
    """Fills this rank's slices; `state` comes from `fragments.state(engine, whole=True)`. All ranks call it together."""
    missing = sorted(set(state) - set(checkpoint.index["tensors"]))
    wrong = [n for n in state if n not in missing and list(state[n].shape) != checkpoint.index["tensors"][n]["shape"]]
    if missing or wrong:
        what = f"has no {missing[0]!r}" if missing else f"holds {wrong[0]!r} in another shape"
        raise CheckpointError(f"{checkpoint.location}: {what}; it was made by another model")
    dcp.load(state, storage_reader=_Reader(checkpoint), process_group=group)


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """What one safetensors file holds: {name: {dtype, shape, start, numel, offset of its bytes in the file}}."""
    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    offsets = json.loads(header.pop("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
    out = {}
    for name, entry in header.items():
        saved = offsets.get(name, {}).get("saved_offsets", [])
        out[name] = {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "start": saved[0] if len(saved) == 1 else 0,
            "numel": math.prod(entry["shape"]),
            "offset": 8 + size + entry["data_offsets"][0],
        }
    return out


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as f:
        while block := f.read(16 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


@contextmanager
def _local_folder(target: Location) -> Iterator[Path]:
    """Where shards are written: the target itself on disk, a temporary folder for S3."""
    if not target.is_s3:
        yield Path(target.path)
    else:
        with tempfile.TemporaryDirectory(prefix="heliostat-") as name:
            yield Path(name)


class Saver:
    """Saves on behalf of one worker; every worker of the group must call `save` and `wait` in the same order."""

    def __init__(self, run: Location, keep: int, group: Any) -> None:
        """`group`: a gloo process group that nothing else uses, because saving runs beside training."""
        self.run, self.keep, self.group = run, keep, group
        self.blocked_s = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def save(self, step: int, state: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """`state`: from `fragments.state`; `facts`: what rank 0 puts into `checkpoint.json`."""
        self.wait()
        started = time.perf_counter()
        copy = {n: t.cpu_copy() if isinstance(t, FlatShard) else t.detach().cpu().clone() for n, t in state.items()}
        self._pending = self._thread.submit(self._write, step, copy, facts)
        self.blocked_s += time.perf_counter() - started

    def wait(self) -> None:
        """Until the save in flight is complete; raises what went wrong with it."""
        if self._pending:
            started = time.perf_counter()
            pending, self._pending = self._pending, None
            pending.result()
            self.blocked_s += time.perf_counter() - started

    def _write(self, step: int, state: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        target, rank = folder(self.run, step), dist.get_rank()
        if rank == 0:
            target.delete()  # what a dead save left; the others write only after rank 0 has planned
        with _local_folder(target) as local:
            writer = HuggingFaceStorageWriter(str(local), save_distributed=True)
            dcp.save(state, storage_writer=writer, process_group=self.group)
            mine = sorted(local.glob(f"shard-{rank + 1:05d}-*.safetensors"))
            shards = [{"file": p.name, "bytes": p.stat().st_size, "crc32": _crc32(p), "tensors": _header(p)} for p in mine]
            if target.is_s3:
                for path in mine:
                    target.join(path.name).upload(path)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, shards, group=self.group)
        if rank == 0:
            index = {"format": FORMAT, "step": step, **facts, **_merge_shards([s for part in gathered for s in part])}
            target.join(INDEX).write(json.dumps(index).encode())
            prune(self.run, self.keep)


def _merge_shards(shards: list[dict[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {}
    for number, shard in enumerate(shards):
        for name, part in shard["tensors"].items():
            entry = tensors.setdefault(name, {"dtype": part["dtype"], "shape": part["shape"], "chunks": []})
            entry["chunks"].append({"shard": number, **{k: part[k] for k in ("start", "numel", "offset")}})
    for entry in tensors.values():
        if len(entry["chunks"]) > 1 or len(entry["shape"]) == 1:  # slices of a flat tensor: its size is where the last one ends
            entry["shape"] = [max(c["start"] + c["numel"] for c in entry["chunks"])]
    return {"shards": [{k: v for k, v in s.items() if k != "tensors"} for s in shards], "tensors": tensors}
