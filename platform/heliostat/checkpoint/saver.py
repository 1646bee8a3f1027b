"""Saves checkpoints in parallel with training: `Saver.save` returns at once if the saver is attached to the optimizer.

State is copied to host memory during the next forward and backward pass. Only the next optimizer step waits for the copy. On a
GPU, only the step's kernels wait, and the host doesn't. The background thread that copies also writes and uploads (`writing`).
`failed` shows whether a save has failed; the next call of `save` or `wait` raises the error of this save on all workers. At most
one save is in flight: the next save waits for it.
"""

from __future__ import annotations

import hashlib
import operator
import threading
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from concurrent import futures
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import cast

import torch
import torch.distributed as dist

from heliostat.checkpoint import checksums, writing
from heliostat.checkpoint.agreement import Channel, Group, agreed, first, merged
from heliostat.checkpoint.columns import ROWS
from heliostat.checkpoint.flat_copy import HostCopy
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.layout import FROZEN, INDEX, SavedCheckpoint, folder, latest, open_checkpoint, steps
from heliostat.checkpoint.loading import casts, load, open_together
from heliostat.checkpoint.retention import Pruner
from heliostat.config import spec
from heliostat.data import device_threads
from heliostat.errors import ConfigError, StorageError
from heliostat.storage import run_folder
from heliostat.storage.lease import Fence
from heliostat.storage.locations import Location

__all__ = ["SavedCheckpoint", "Saver", "casts", "folder", "latest", "load", "open_checkpoint", "open_together", "steps"]

PIECE = 64 * checksums.BLOCK  # bytes per copy from the device
TOLERATED = 3  # consecutive failed saves that don't end training
PULSE_S = 1.0  # seconds between checks of a save while waiting for it
TAG = 1  # tag of the savers' channel
LONGEST = timedelta(hours=12)  # a worker's longest wait for another worker's part; the watchdog detects stalls


class Saver:
    """Saves checkpoints for one worker. All workers of the group must call `save` and `wait` in the same order."""

    def __init__(
        self,
        run: Location,
        policy: spec.Checkpoint,
        group: dist.ProcessGroup,
        fence: Fence | None = None,
        progressed: Callable[[], None] = lambda: None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Prepares a worker's saver.

        `group`: a gloo process group. The saver uses its own channel, because saving runs in parallel with training.
        `progressed`: called while the saver waits for a save that makes progress; `notice`: reports old checkpoints that can't
        be removed.
        """
        self.run, self.policy, self.group, self.fence = run, policy, group, fence
        self.channel = Channel(group, TAG, LONGEST)
        self.blocked_s = 0.0
        self.promised: Mapping[str, bool] | None = None  # as for `write`
        self._progressed, self._written = progressed, 0
        self.frozen = Keeper(run, self.channel, lambda place, slices: self._store(place, None, slices, {}))
        self._pruner = Pruner(run, policy, fence)
        self._notice, self._unpruned = notice, 0
        self._thread = device_threads.pool(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._started: Future[None] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._host = HostCopy()
        self._follows = False

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes later saves copy in the background thread.

        A step of `optimizer` then waits for the copy before it changes the state.
        """
        optimizer.register_step_pre_hook(lambda *_: self.before_change())
        self._follows = True

    def save(
        self,
        step: int,
        state: dict[str, torch.Tensor],
        facts: Mapping[str, object],
        frozen: dict[str, FlatShard] | None = None,
        seal: Callable[[Channel], dict[str, object]] = lambda channel: {},
        snapshot: Collection[str] = (),
    ) -> None:
        """Saves the state of a step as a checkpoint.

        `state`: from `ShardedState.tensors`; `frozen`: from `ShardedState.frozen`; `facts`: entries of `checkpoint.json` from
        rank 0. `seal`: runs in the thread on all workers; writes the files that must exist before the checkpoint, and returns
        more entries of `checkpoint.json`. `snapshot`: kinds of averages to store as a snapshot, too (`checkpoint.snapshots`).
        Raises ConfigError if the best metric isn't one of the scores. If the previous save failed, raises its error.
        """
        best, scores = self.policy.best, cast("Mapping[str, float]", facts["metrics"]).keys() - {"train_loss"}
        if best and scores and best.metric not in scores and not best.is_late:
            raise ConfigError(
                f"checkpoint.best.metric: {best.metric!r} isn't a score of the recipe. Use one of: {', '.join(sorted(scores))}"
            )
        self.wait()
        started = time.perf_counter()
        # the forward pass may change buffers, so they are copied now
        state = {n: t if isinstance(t, FlatShard) else t.detach().cpu().clone() for n, t in state.items()}
        self._host.mark({n: t for n, t in state.items() if isinstance(t, FlatShard)})
        self._copied.clear()
        self._pending = self._started = self._thread.submit(self._write, step, state, facts, frozen or {}, seal, snapshot)
        self.blocked_s += time.perf_counter() - started
        if not self._follows:
            self.before_change()

    @property
    def busy(self) -> bool:
        """Returns whether a save is running in the thread."""
        return self._started is not None and not self._started.done()

    @property
    def failed(self) -> bool:
        """Returns whether the save in flight has failed on this worker.

        Then all workers should call `wait`, which raises the error.
        """
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> bool:
        """Waits until the save in flight is complete; returns whether a save was in flight.

        An error on one worker is raised on all workers.
        """
        if not self._pending:
            return False
        started = time.perf_counter()
        pending, self._pending = self._pending, None
        try:
            agreed(self.channel, lambda: self._until(pending))
        finally:
            self.blocked_s += time.perf_counter() - started
        return True

    def _until(self, pending: Future[None]) -> None:
        while futures.wait([pending], PULSE_S).not_done:
            self._pass_on_progress()
        pending.result()

    def before_change(self) -> None:
        """Waits until a change of the training state can't affect the save in flight.

        On a GPU, the host waits only until the copies are queued. Work that is queued later waits until the copies are done.
        """
        self._until_copied()
        self._host.hold_back()

    def _until_copied(self) -> None:
        started = time.perf_counter()
        while not self._copied.wait(PULSE_S):
            self._pass_on_progress()
        self.blocked_s += time.perf_counter() - started

    def _pass_on_progress(self) -> None:
        """Reports progress if something was written since the last check.

        So the watchdog can detect a save that makes no progress.
        """
        written, self._written = self._written, 0
        if written:
            self._progressed()

    def _wrote(self) -> None:
        self._written += 1

    def _write(
        self,
        step: int,
        state: dict[str, torch.Tensor],
        facts: Mapping[str, object],
        frozen: dict[str, FlatShard],
        seal: Callable[[Channel], dict[str, object]],
        snapshot: Collection[str],
    ) -> None:
        try:
            copied = self._copy(state)
            error = None
        except Exception as e:  # noqa: BLE001 (raised below on all workers; otherwise they would wait for this worker)
            copied, error = {}, e
        finally:
            self._copied.set()
        agreed(self.channel, partial(self._until_on_host, error))
        facts = {**facts, **seal(self.channel)}
        if snapshot:  # before the checkpoint, so that a run that resumes from it has the snapshot
            kinds = tuple(f"{kind}." for kind in snapshot)
            averages = {n: t for n, t in copied.items() if n.startswith(kinds)}
            self._store(run_folder.averages(self.run, step), step, averages, facts)
        if name := self.frozen.keep(frozen):
            facts = {**facts, FROZEN: name}
        self._store(folder(self.run, step), step, copied, facts, self.promised)
        if dist.get_rank() == 0:
            self._prune(step, bool(snapshot))

    def _prune(self, step: int, snapshot: bool) -> None:
        """Removes old checkpoints, and snapshots that the run no longer has. `snapshot`: whether this save wrote one.

        If the store fails meanwhile, only logs a warning, because the new checkpoint is complete.
        """
        try:
            self._pruner.prune(step)
            self._pruner.prune_snapshots(step if snapshot else step - 1)
            self._unpruned = 0
        except StorageError as e:
            self._unpruned += 1
            again = f", {self._unpruned} times in a row" if self._unpruned > 1 else ""
            self._notice(
                f"step {step}: can't remove old checkpoints{again}. These checkpoints use space until heliostat "
                f"can delete them: {e}"
            )

    def _copy(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        slices = {n: t for n, t in state.items() if isinstance(t, FlatShard)}
        return {**state, **self._host.copy(slices, self._wrote)}

    def _until_on_host(self, error: Exception | None) -> None:
        if error:
            raise error
        self._host.wait()

    def _store(
        self,
        target: Location,
        step: int | None,
        tensors: Mapping[str, torch.Tensor],
        facts: Mapping[str, object],
        promised: Mapping[str, bool] | None = None,
    ) -> None:
        writing.write(target, step, tensors, facts, self.channel, self._wrote, self.fence, promised)


class Keeper:
    """Saves one worker's frozen parameters, once per run. All workers make the same calls in the same order.

    The folder `checkpoints/frozen-<digest>` is named after the content on all ranks, and checkpoints refer to it by name. Every
    save checks whether the content has changed. If so, the new content is written under another name. A resumed run uses the
    folder of the checkpoint that it loaded, with any number of workers and any precision, until the parameters change.
    """

    def __init__(self, run: Location, group: Group, write: Callable[[Location, dict[str, FlatShard]], None]) -> None:
        """Prepares the keeper. `write`: saves slices as a folder, together with the other workers."""
        self.run, self.group, self._write = run, group, write
        self._loaded = self._folder = ""

    def loaded(self, checkpoint: SavedCheckpoint, slices: dict[str, FlatShard]) -> None:
        """Records that the slices were loaded from the checkpoint, and were perhaps cast.

        Until the slices change, later saves use the checkpoint's folder of frozen parameters.
        """
        if checkpoint.frozen:
            self._folder = checkpoint.frozen.location.name
            self._loaded = self._name(slices)

    def keep(self, slices: dict[str, FlatShard]) -> str | None:
        """Saves the slices as a folder, unless this folder exists; returns the folder's name, or None if no worker has slices."""
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
        parts = merged(self.group, lambda: [slices_digest(slices)], operator.add)  # only rank 0 gets the digests
        return first(self.group, lambda: f"{FROZEN}-{hashlib.sha256(' '.join(parts or []).encode()).hexdigest()[:16]}")


def slices_digest(slices: Mapping[str, FlatShard]) -> str:
    """Computes a digest of this rank's slices: their names, dtypes, places, and a CRC-32 of each piece."""
    summed = hashlib.sha256()
    for name in sorted(slices):
        shard = slices[name]
        order = f" {shard.columns}" if shard.columns != ROWS else ""
        summed.update(f"{name} {shard.dtype} {shard.shape[0]} {shard.start} {shard.local.numel()}{order}".encode())
        for piece in shard.local.split(PIECE // shard.local.element_size()):
            summed.update(zlib.crc32(checksums.as_bytes(piece.cpu()).numpy().data).to_bytes(4, "big"))
    return summed.hexdigest()
