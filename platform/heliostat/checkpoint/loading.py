"""Loads a checkpoint into a worker's slices, at any ZeRO stage and world size.

A worker computes which shards hold its slices, and reads the indexes of these shards. Then the worker reads only the blocks that
contain its slices, and checks each block (`checksums`). Nothing is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from heliostat.checkpoint import safetensors_file
from heliostat.checkpoint.agreement import Group, agreed, first
from heliostat.checkpoint.columns import ROWS, Columns
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.layout import SavedCheckpoint, is_average, open_checkpoint
from heliostat.errors import CheckpointError, WorkerError
from heliostat.storage.locations import Location


def open_together(run: Location, step: int, group: Group) -> SavedCheckpoint:
    """Opens the checkpoint of a step on all ranks. Only rank 0 reads `checkpoint.json` and lists the shards.

    Raises CorruptCheckpointError on all ranks if the checkpoint is incomplete.
    """
    return first(group, lambda: open_checkpoint(run, step))


def load(
    checkpoint: SavedCheckpoint, state: dict[str, torch.Tensor], group: Group, progressed: Callable[[], None] = lambda: None
) -> int:
    """Loads a checkpoint into this rank's slices; returns the number of bytes read. Calls `progressed` after each request.

    `state`: from `ShardedState.tensors(whole=True)`, and from `ShardedState.frozen` if the checkpoint has frozen parameters.
    Tensors are read in their stored dtype, then cast to the engine's dtype (`casts` describes the rounding).

    All ranks call this function together. If one rank fails, all ranks raise its error: CorruptCheckpointError if the data is
    damaged. After an error, the state is unusable.
    """
    _check(checkpoint, state)
    stored = {n: safetensors_file.DTYPES[checkpoint.tensors[n].dtype] for n in state}
    targets = {n: _target(t, stored[n]) for n, t in state.items()}

    def read() -> int:
        sources = [source for source in (checkpoint, checkpoint.frozen) if source]
        return sum(_read(s, {n: t for n, t in targets.items() if checkpoint.holder(n) is s}, state, progressed) for s in sources)

    try:
        total = agreed(group, read)
    except WorkerError as e:
        raise CheckpointError(f"{checkpoint.location}: can't load this checkpoint: {e}") from e
    for name, target in targets.items():
        local = _local(state[name])
        if target.data_ptr() != local.data_ptr():
            local.copy_(target)
    return total


def _check(checkpoint: SavedCheckpoint, state: dict[str, torch.Tensor]) -> None:
    """Raises CheckpointError unless the checkpoint has the state's tensors, in equal shapes and with dtypes that can be cast."""
    tensors = checkpoint.tensors
    missing = sorted(set(state) - set(tensors))
    wrong = [
        n for n in state if n not in missing and (list(state[n].shape) != tensors[n].shape or not _turns(checkpoint, n, state[n]))
    ]
    if missing and all(is_average(name) for name in missing):
        kind = missing[0].partition(".")[0]
        raise CheckpointError(
            f"{checkpoint.location}: has no average {kind!r}, and an average can't begin in the middle of a run. Restore "
            "train.ema as it was, or use another name for the run"
        )
    if missing or wrong:
        what = f"has no tensor {missing[0]!r}" if missing else f"has tensor {wrong[0]!r} in another shape than the model"
        raise CheckpointError(
            f"{checkpoint.location}: {what}. Another model made this checkpoint. Use that model, or another name for the run"
        )
    for name, tensor in state.items():
        stored = safetensors_file.DTYPES[tensors[name].dtype]
        if stored != tensor.dtype and not (stored.is_floating_point and tensor.dtype.is_floating_point):
            what = f"has tensor {name!r} as {stored}, but the model has this tensor as {tensor.dtype}"
            raise CheckpointError(
                f"{checkpoint.location}: {what}. Another model made this checkpoint. Use that model, or another name for the run"
            )


def _turns(checkpoint: SavedCheckpoint, name: str, tensor: torch.Tensor) -> bool:
    """Checks whether a tensor can be converted from its element order in the checkpoint to its element order in the state.

    Returns true if the rows have the same width in both orders.
    """
    return len({order.width for order in (checkpoint.order(name), _order(tensor)) if order != ROWS}) <= 1


def _order(tensor: torch.Tensor) -> Columns:
    return tensor.columns if isinstance(tensor, FlatShard) else ROWS


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.local if isinstance(tensor, FlatShard) else tensor.detach()


def _target(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the memory to read into: the tensor's own memory if it is contiguous and has the stored dtype, else new memory."""
    local = _local(tensor)
    own = local.dtype == dtype and local.is_contiguous()
    return local if own else torch.empty(local.shape, dtype=dtype, device=local.device)


def _read(
    source: SavedCheckpoint, targets: dict[str, torch.Tensor], state: dict[str, torch.Tensor], progressed: Callable[[], None]
) -> int:
    starts = {n: getattr(state[n], "start", 0) for n in targets}
    turned = {n for n in targets if source.order(n) != _order(state[n])}
    source.fetch_places(_shards(source, targets, starts, turned))
    straight = [part for n, t in targets.items() if n not in turned for part in source.slices(n, starts[n], t)]
    total = source.fill(straight, progressed)
    return total + sum(source.read_into(n, _order(state[n]), starts[n], targets[n], progressed) for n in turned)


def _shards(source: SavedCheckpoint, targets: dict[str, torch.Tensor], starts: dict[str, int], turned: set[str]) -> Iterable[int]:
    """Lists the shards whose indexes are needed.

    For a tensor that is stored in another order than in the state, these are all shards with elements of this tensor.
    """
    wanted = {n: (0, math.prod(source.tensors[n].shape)) if n in turned else (starts[n], t.numel()) for n, t in targets.items()}
    return sorted({shard for n, (first, numel) in wanted.items() for shard in source.needed(n, first, numel)})


def casts(checkpoint: SavedCheckpoint, state: dict[str, torch.Tensor]) -> str | None:
    """Describes, for the user, the tensors that `load` rounds; returns None if `load` rounds no tensor.

    `load` rounds a tensor if the engine's dtype has fewer bits than the checkpoint's.

    If the checkpoint was saved at another ZeRO stage or precision, the same model can have other dtypes. For example, zero.Init
    gives buffers low precision.
    """
    changed: dict[str, list[str]] = {}
    tensors = checkpoint.tensors
    for name, tensor in state.items():
        stored = safetensors_file.DTYPES[tensors[name].dtype]
        if torch.promote_types(stored, tensor.dtype) != tensor.dtype:
            changed.setdefault(f"from {stored} to {tensor.dtype}".replace("torch.", ""), []).append(name)
    parts = [f"{len(names)} tensors {how} ({names[0]}{', ...' * (len(names) > 1)})" for how, names in changed.items()]
    return f"{checkpoint.location}: rounded to the precision of this run: {'; '.join(parts)}" if parts else None
