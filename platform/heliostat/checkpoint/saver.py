"""Saves and loads checkpoints: safetensors shards planned by stock torch.distributed.checkpoint (DCP), and `checkpoint.json`.

A rank reads only the blocks that hold its slices, at any ZeRO stage and world size (`zero_state`), and checks each (`checksums`).
Nothing is ever unpickled. Writing `checkpoint.json` last makes a checkpoint valid.

`Saver.save` returns at once where it follows the optimizer: the copy to host memory runs beside the next forward and backward
pass, and only the next optimizer step waits for it. Writing and uploading run in the same background thread; `failed` tells
whether that has failed, and the next call raises why, on all workers. At most one save is in flight: the next one waits for it.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.metadata import TensorStorageMetadata as TensorMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

from heliostat.checkpoint import checksums, safetensors_file
from heliostat.checkpoint.agreement import together
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.frozen import Keeper
from heliostat.checkpoint.layout import FORMAT, FROZEN, INDEX, Checkpoint, encode, folder, latest, open_checkpoint, steps
from heliostat.checkpoint.retention import Pruner
from heliostat.config import spec
from heliostat.errors import CheckpointError, ConfigError, HeliostatError
from heliostat.lease import Fence
from heliostat.storage import Location

__all__ = ["Checkpoint", "Saver", "folder", "latest", "load", "open_checkpoint", "steps"]


PULSE_S = 1.0  # between two looks at a save that is waited for

# loading -------------------------------------------------------------------------------------------------------------


def load(
    checkpoint: Checkpoint, state: dict[str, torch.Tensor], group: Any, progressed: Callable[[], None] = lambda: None
) -> int:
    """Loads a checkpoint into this rank's slices; returns the bytes read. Calls `progressed` after each request.

    `state` comes from `zero_state.state(engine, whole=True)`, and from `zero_state.frozen` where the checkpoint has frozen
    parameters. Tensors are read in their stored type, then cast to the engine's (`casts` describes what that rounds).

    All ranks call it together, and all of them raise if one does: CorruptCheckpointError if what is read is not what was written.
    The state is then useless.
    """
    tensors = checkpoint.tensors
    missing = sorted(set(state) - set(tensors))
    wrong = [n for n in state if n not in missing and list(state[n].shape) != tensors[n]["shape"]]
    if missing or wrong:
        what = f"has no {missing[0]!r}" if missing else f"holds {wrong[0]!r} in another shape"
        raise CheckpointError(f"{checkpoint.location}: {what}; it was made by another model")
    held = {n: safetensors_file.DTYPES[tensors[n]["dtype"]] for n in state}
    if odd := next((n for n in state if held[n] != state[n].dtype and not _both_float(held[n], state[n].dtype)), None):
        what = f"holds {odd!r} as {held[odd]}, and the model has it as {state[odd].dtype}"
        raise CheckpointError(f"{checkpoint.location}: {what}; it was made by another model")
    targets = {n: t if t.dtype == held[n] else _blank(t, held[n]) for n, t in state.items()}
    total = 0
    for source in (checkpoint, checkpoint.frozen):
        if source and (own := {n: t for n, t in targets.items() if checkpoint.holder(n) is source}):
            reader = _Reader(source, progressed)
            with _plain_errors(f"{source.location}: cannot be loaded"):
                dcp.load(own, storage_reader=reader, process_group=group)
            total += reader.bytes_read
    for name, target in targets.items():
        if target is not state[name]:
            _local(state[name]).copy_(_local(target))
    return total


def casts(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> str | None:
    """Describes for the user what `load` rounds because the engine holds it in fewer bits than the checkpoint; None if nothing.

    The same model has other types at another ZeRO stage or precision: buffers that it makes under zero.Init are of low precision.
    """
    changed: dict[str, list[str]] = {}
    for name, tensor in state.items():
        held = safetensors_file.DTYPES[checkpoint.tensors[name]["dtype"]]
        if torch.promote_types(held, tensor.dtype) != tensor.dtype:
            changed.setdefault(f"from {held} to {tensor.dtype}".replace("torch.", ""), []).append(name)
    parts = [f"{len(names)} tensors {how} ({names[0]}{', ...' * (len(names) > 1)})" for how, names in changed.items()]
    return f"{checkpoint.location}: loaded into an engine of fewer bits, rounded: {'; '.join(parts)}" if parts else None


def _both_float(one: torch.dtype, other: torch.dtype) -> bool:
    return one.is_floating_point and other.is_floating_point


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.local if isinstance(tensor, FlatShard) else tensor.detach()


def _blank(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Allocates a tensor to load a tensor, or a slice of one, into, in the type that it is stored in."""
    made = torch.empty_like(_local(tensor), dtype=dtype)
    return FlatShard(made, tensor.start, tensor.shape[0]) if isinstance(tensor, FlatShard) else made


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Raises the first worker's own error where DCP raises a BaseException that holds every worker's."""
    try:
        yield
    except CheckpointException as e:
        rank, (error, _) = min(e.failures.items())
        if isinstance(error, HeliostatError):
            raise error from e
        raise CheckpointError(f"{what}: worker {rank}: {type(error).__name__}: {error}") from e


class _Reader(StorageReader):
    """Reads through DCP by `checkpoint.json`."""

    def __init__(self, checkpoint: Checkpoint, progressed: Callable[[], None]) -> None:
        self.checkpoint, self.progressed = checkpoint, progressed
        self.bytes_read = 0

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, dict[str, Any]] = {}
        for name, entry in self.checkpoint.index["tensors"].items():
            shape, chunks = torch.Size(entry["shape"]), []
            for chunk in entry["chunks"]:
                part = len(shape) == 1  # what is sliced is flat
                offsets = torch.Size([chunk["start"]]) if part else torch.Size([0] * len(shape))
                chunks.append(ChunkStorageMetadata(offsets, torch.Size([chunk["numel"]]) if part else shape))
                places[MetadataIndex(name, offsets)] = chunk
            tensors[name] = TensorMetadata(TensorProperties(dtype=safetensors_file.DTYPES[entry["dtype"]]), shape, chunks)
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        wanted, targets = [], []
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            filled = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
            targets.append((item, target, filled))
            first = item.storage_offsets[0] if len(item.storage_offsets) == 1 else 0
            wanted.append(self.checkpoint.slice(item.storage_index.fqn, self.places[item.storage_index], first, filled))
        self.bytes_read = self.checkpoint.fill(wanted, self.progressed)
        for item, target, filled in targets:
            if filled is not target:
                target.copy_(filled)
            planner.commit_tensor(item, target)
        return _done(None)


def _done(value: Any) -> torch.futures.Future:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(value)
    return future


# saving --------------------------------------------------------------------------------------------------------------


class _Writer(StorageWriter):
    """Writes through DCP: one safetensors file from each rank that has something to write, then `checkpoint.json`.

    If one rank fails, all ranks raise its error, and `checkpoint.json` is not written. `fence`: of who saves, if others may.
    """

    def __init__(
        self, target: Location, step: int | None, facts: dict[str, Any], wrote: Callable[[], None], fence: Fence | None
    ) -> None:
        """Prepares the writer; `wrote` is called for every block that is written, and for every window of an upload."""
        self.target, self.step, self.facts, self.wrote, self.fence = target, step, facts, wrote, fence

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if self.fence:
            self.fence.check()
        self.target.join(INDEX).delete()  # an earlier save of this step, or what is left of a dead one
        self.target.delete()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        if not plan.items:
            return _done([])
        entries, chunks, starts = [], {}, {}
        for item in plan.items:
            name, tensor = item.index.fqn, planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor) and item.tensor_data
            offsets, crc32 = list(item.tensor_data.chunk.offsets), list[int]()
            starts[name] = {"saved_offsets": offsets}
            chunks[name] = {"start": offsets[0] if len(offsets) == 1 else 0, "numel": tensor.numel(), "crc32": crc32}
            entries.append(
                safetensors_file.Entry(name, tensor.dtype, tuple(tensor.shape), partial(_checked, tensor, crc32, self.wrote))
            )
        file = f"shard-{dist.get_rank():05d}.safetensors"
        # what torch's own HuggingFaceStorageReader needs to read the folder
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(starts)}
        with _local_folder(self.target) as local:
            places = safetensors_file.write(local / file, entries, metadata)
            shard = {"file": file, "bytes": (local / file).stat().st_size}
            if self.target.is_s3:
                self.target.join(file).upload(local / file, self.wrote)
        told = [(shard, {**chunks[item.index.fqn], "offset": places[item.index.fqn]}) for item in plan.items]
        return _done([WriteResult(item.index, 0, data) for item, data in zip(plan.items, told, strict=True)])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for result in results if result]
        tensors: dict[str, Any] = {}
        for name, meta in metadata.state_dict_metadata.items():
            assert isinstance(meta, TensorMetadata)
            tensors[name] = {"dtype": safetensors_file.NAMES[meta.properties.dtype], "shape": list(meta.size), "chunks": []}
        for number, result in enumerate(written):
            for item in result:
                tensors[item.index.fqn]["chunks"].append({"shard": number, **item.storage_data[1]})
        shards = [result[0].storage_data[0] for result in written]
        index = {"format": FORMAT, "step": self.step, **self.facts, "shards": shards, "tensors": tensors}
        if self.fence:
            self.fence.check()
        self.target.join(INDEX).write(encode(index))


def _checked(tensor: torch.Tensor, crc32: list[int], wrote: Callable[[], None]) -> Iterator[memoryview]:
    """Yields the tensor's blocks as they are written; appends the CRC-32 of each to the list."""
    for block in checksums.cut(checksums.as_bytes(tensor)):
        crc32.append(zlib.crc32(block))
        yield block
        wrote()


@contextmanager
def _local_folder(target: Location) -> Iterator[Path]:
    """Provides the folder that shards are written to: the target itself on disk, a temporary folder for S3."""
    if not target.is_s3:
        yield Path(target.path)
    else:
        with tempfile.TemporaryDirectory(prefix="heliostat-") as name:
            yield Path(name)


class Saver:
    """Saves on behalf of one worker; every worker of the group must call `save` and `wait` in the same order."""

    def __init__(
        self,
        run: Location,
        policy: spec.Checkpoint,
        group: Any,
        fence: Fence | None = None,
        progressed: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares a worker's saver.

        `group`: a gloo process group that nothing else uses, because saving runs beside training; `progressed` is called while
        this waits for a save that makes progress.
        """
        self.run, self.policy, self.group, self.fence = run, policy, group, fence
        self.blocked_s = 0.0
        self._progressed, self._written = progressed, 0
        self.frozen = Keeper(run, group, lambda place, slices: self._store(place, None, slices, {}))
        self._pruner = Pruner(run, policy, fence)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._started: Future | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._copies: dict[str, torch.Tensor] = {}  # kept between saves: fresh memory costs more than the copy
        self._follows = False

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes later saves copy in the thread: a step of `optimizer`, which changes the state, waits until the copy is done."""
        optimizer.register_step_pre_hook(lambda *_: self._until_copied())
        self._follows = True

    def save(
        self, step: int, state: dict[str, torch.Tensor], facts: dict[str, Any], frozen: dict[str, FlatShard] | None = None
    ) -> None:
        """Saves the state of a step as a checkpoint.

        `state`: of `zero_state.state`; `frozen`: of `zero_state.frozen`; `facts`: what rank 0 puts into `checkpoint.json`.
        """
        best, scores = self.policy.best, facts["metrics"].keys() - {"train_loss"}
        if best and scores and best.metric not in scores:
            raise ConfigError(f"checkpoint.best.metric: {best.metric!r} is no score; there are {', '.join(sorted(scores))}")
        self.wait()
        started = time.perf_counter()
        # the forward pass may change buffers: they are copied now
        state = {n: t if isinstance(t, FlatShard) else t.detach().cpu().clone() for n, t in state.items()}
        self._copied.clear()
        self._pending = self._started = self._thread.submit(self._write, step, state, facts, frozen or {})
        self.blocked_s += time.perf_counter() - started
        if not self._follows:
            self._until_copied()

    @property
    def busy(self) -> bool:
        """Tells whether a save goes on in the thread."""
        return self._started is not None and not self._started.done()

    @property
    def failed(self) -> bool:
        """Tells whether the save in flight has failed on this worker: then all workers should `wait`, which raises the error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits until the save in flight is complete; an error of one worker is raised on all of them."""
        if self._pending:
            started = time.perf_counter()
            pending, self._pending = self._pending, None
            together(self.group, lambda: self._until(pending))
            self.blocked_s += time.perf_counter() - started

    def _until(self, pending: Future) -> None:
        while futures.wait([pending], PULSE_S).not_done:
            self._pass_on_progress()
        pending.result()

    def _until_copied(self) -> None:
        started = time.perf_counter()
        while not self._copied.wait(PULSE_S):
            self._pass_on_progress()
        self.blocked_s += time.perf_counter() - started

    def _pass_on_progress(self) -> None:
        """Reports progress if something was written since the last check: a save that stands still is a stall like any other."""
        written, self._written = self._written, 0
        if written:
            self._progressed()

    def _wrote(self) -> None:
        self._written += 1

    def _write(self, step: int, state: dict[str, torch.Tensor], facts: dict[str, Any], frozen: dict[str, FlatShard]) -> None:
        try:
            copied = {n: self._copy(n, t) if isinstance(t, FlatShard) else t for n, t in state.items()}
            error = None
        except Exception as e:  # noqa: BLE001 (raised below, on all workers, which would wait for this one)
            copied, error = {}, e
        finally:
            self._copied.set()
        together(self.group, partial(_raise, error))
        if name := self.frozen.keep(frozen):
            facts = {**facts, FROZEN: name}
        self._store(folder(self.run, step), step, copied, facts)
        if dist.get_rank() == 0:
            self._pruner.prune(step)

    def _store(self, target: Location, step: int | None, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> None:
        with _plain_errors(f"{target}: cannot be saved"):
            dcp.save(
                dict(tensors), storage_writer=_Writer(target, step, facts, self._wrote, self.fence), process_group=self.group
            )

    def _copy(self, name: str, shard: FlatShard) -> FlatShard:
        if name not in self._copies:
            self._copies[name] = torch.empty(shard.local.shape, dtype=shard.dtype, pin_memory=shard.local.is_cuda)
        self._wrote()
        return FlatShard(self._copies[name].copy_(shard.local), shard.start, shard.shape[0])


def _raise(error: Exception | None) -> None:
    if error:
        raise error
