"""Saves a worker's training state to storage, keeps copies of this state in memory, and restores the state from storage or
memory.

    state.save(done)                # writes a checkpoint and its receipt to storage: collective
    state.keep(done)                # copies the same state into the memory of two nodes
    state.averaged()                # a context that computes with the averaged weights, if the job keeps an average
    state.restore(source)           # at an attempt's start; `source`: in-memory checkpoints; None: storage

Saves and copies run while training continues. Two operations change the state: the optimizer's step, and the exchange of the
weights with their average. Both wait until the state is copied.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import ray
import torch

from heliostat.checkpoint import agreement
from heliostat.checkpoint import saver as checkpoint
from heliostat.checkpoint.agreement import Channel
from heliostat.checkpoint.layout import INDEX
from heliostat.data import device_ranges
from heliostat.engine import ema, sharded_state
from heliostat.engine.sharded_state import MASTER
from heliostat.errors import AccessError, CheckpointError, StorageError
from heliostat.recipes import folder_digests
from heliostat.runs.events import Saved
from heliostat.storage import wire
from heliostat.storage.records import Format, Whole
from heliostat.tracking import local_curves
from heliostat.training.memory_keeper import CopyFacts, CopySource
from heliostat.training.worker import memory_copies
from heliostat.training.worker.context import Context, Due, Hook
from heliostat.training.worker.memory_copies import MemoryCopies
from heliostat.training.worker.unsealed import Unsealed, UnsealedPart

if TYPE_CHECKING:
    from heliostat.engine.deepspeed_engine import DeepSpeedEngine


@dataclass(frozen=True)
class ResumeFacts:
    """Holds the engine's state that a resumed run needs in addition to tensors. `checkpoint.json` and in-memory checkpoints have
    each field.

    To add a field: declare it with a default, which older checkpoints need, read it in `of`, and use it in `apply`.
    """

    optimizer_steps: Whole
    loss_scale: dict[str, int | float] | None = None

    @classmethod
    def of(cls, engine: DeepSpeedEngine) -> ResumeFacts:
        sharded = sharded_state.of(engine)
        return cls(optimizer_steps=sharded.steps, loss_scale=sharded.read_loss_scale())

    def apply(self, engine: DeepSpeedEngine) -> str | None:
        """Completes an engine whose tensors were loaded. Returns a notice for the user, if there is one."""
        sharded = sharded_state.of(engine)
        sharded.after_load(self.optimizer_steps)
        return sharded.write_loss_scale(self.loss_scale)


RESUME = Format(ResumeFacts, "index that this version of heliostat resumes from", CheckpointError)


class TrainingState(Hook):
    """Holds the parts of this worker's checkpoint: the engine, the averaged weights, and the samples since the last receipt."""

    def __init__(self, context: Context, engine: DeepSpeedEngine, unsealed: Unsealed, memory: MemoryCopies | None = None) -> None:
        self.context, self.engine, self.unsealed, self.memory = context, engine, unsealed, memory
        self.sharded = sharded_state.of(engine)
        self.saver = checkpoint.Saver(
            context.run_folder, context.job.checkpoint, context.control, context.fence, context.progressed,
            context.posts.notice_of_any,
        )  # fmt: skip
        if base := self.sharded.base:
            self.saver.promised = {f"{MASTER}.{name}": zero for name, zero in base.trained.items()}
            # before the first step, because a save that reads a large base for minutes counts as stalled
            agreement.first(context.control, lambda: base.digest)
        self.copies = memory is not None
        self.failed = self._in_a_row = 0  # failed saves: in this attempt, and in a row
        self._sealing: tuple[UnsealedPart, int] | None = None  # samples and number of events in the current save
        for copies in self._copies():
            copies.attach(self.sharded.optimizer)
        self.average = ema.of(context.job, engine)

    @property
    def blocked_s(self) -> float:
        """Returns the seconds that training has waited for saves and copies."""
        return self.saver.blocked_s + (self.memory.blocked_s if self.memory else 0.0)

    @property
    def unsettled(self) -> bool:
        return self.saver.failed

    def tensors(self, whole: bool = False) -> dict[str, torch.Tensor]:
        return self.sharded.tensors(whole) | (self.average.state(whole) if self.average else {})

    def after_step(self, done: int, due: Due) -> None:
        """Waits until the keepers have the newest in-memory checkpoint, before the step is reported.

        So when a step is reported, all copies of earlier steps have arrived at the keepers.
        """
        if self.memory and due.keeps:
            with self.context.ledger("checkpoint"):
                self.memory.wait()

    def on_save(self, done: int, due: Due) -> None:
        """Saves a checkpoint if a save is due, and copies the state into memory if a copy is due.

        Before a pause point, waits until the save is complete.
        """
        if not (due.saves or due.keeps or due.holds):
            return
        with self.context.ledger("checkpoint"), device_ranges.named("save"):
            if due.saves:
                self.save(done)
            if due.keeps:
                self.keep(done)
            while due.holds and not self.settle():  # a decision needs the checkpoint, so save again
                self.save(done)

    def settle(self) -> bool:
        """Waits for the save in flight.

        If the store failed, training continues without that checkpoint, at most TOLERATED times in a row.

        All workers call this method together. Returns whether no save has failed. Raises StorageError after too many failures,
        and AccessError at once.
        """
        try:
            if self._saved():
                self._in_a_row = 0
            return True
        except AccessError:
            raise  # the next save would fail, too
        except StorageError as e:  # the same on all workers
            self.failed, self._in_a_row = self.failed + 1, self._in_a_row + 1
            again = f"failed saves in a row: {self._in_a_row}; limit: {checkpoint.TOLERATED}"
            if self._in_a_row > checkpoint.TOLERATED:
                raise
            self.context.posts.notice(f"can't save a checkpoint ({again}). Training continues without this checkpoint: {e}")
            return False

    def wait(self) -> None:
        """Waits until the save in flight and the copy in flight are complete."""
        self._saved()
        if self.memory:
            self.memory.wait()

    def _saved(self) -> bool:
        """Waits for the save in flight, if any, and forgets the samples and events that its receipt covers. All workers know the
        result."""
        try:
            return self.saver.wait()
        finally:
            if self._sealing:
                (part, events), self._sealing = self._sealing, None
                self.unsealed.drop(part)
                if part.sealed:
                    del self.context.posts.unsaved[:events]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Computes with the averaged weights inside the context, if the job keeps an average.

        Waits for saves and copies in flight. This is needed because there may have been no optimizer step since the save, for
        example after an overflow. Then nothing has waited for the save yet.
        """
        if self.average is None:
            yield
            return
        for copies in self._copies():
            copies.before_change()
        with self.average.applied():
            yield

    def _copies(self) -> list[checkpoint.Saver | MemoryCopies]:
        return [self.saver, self.memory] if self.memory else [self.saver]

    # saving ----------------------------------------------------------------------------------------------------------

    def save(self, done: int) -> None:
        """Begins to save the state after step `done`.

        The saver's thread first seals the samples up to that step. All workers call this method together.
        """
        context, posts = self.context, self.context.posts
        context.progressed()
        self.settle()

        part, events = self.unsealed.part(done), list(posts.unsaved)

        def first() -> None:
            context.fence.check()
            local_curves.write(context.run_folder, done, events)

        def seal(channel: Channel) -> dict[str, object]:
            sealed = self.unsealed.write(part, channel, first)
            entries = {"receipt": {"steps": done, "chain": sealed.chain}, "bad_samples": sealed.replaced}
            base = self.sharded.base if context.rank == 0 else None
            return {**entries, "base": base.digest} if base else entries

        facts = {
            "name": context.job.name,
            "world_size": context.world,
            "zero_stage": context.job.train.zero.stage,
            **asdict(ResumeFacts.of(self.engine)),
            "job": context.job.dump(),
            "data": context.plan.dump(),
            "data_digest": context.plan.digest,
            "metrics": self._metrics(done),
            "written": time.time(),
        }
        settings = context.job.train.ema
        kinds = settings.by_length if settings and settings.snapshot_due(done, context.job.checkpoint.every) else ()
        self.saver.save(done, self.tensors(), facts, self.sharded.frozen(), seal, kinds)
        self._sealing = part, len(events)
        context.progressed()
        posts.post(Saved(step=done, blocked_s=self.saver.blocked_s, failed=self.failed, ledger=context.ledger.totals()))

    def keep(self, done: int) -> None:
        """Copies the state after a step into memory, with everything that a checkpoint and its receipt would contain."""
        assert self.memory
        self.context.progressed()
        facts = CopyFacts(done, self.context.world, self.context.plan.digest, asdict(ResumeFacts.of(self.engine)))
        own = self.unsealed.part(done), list(self.context.posts.unsaved)
        self.memory.keep(facts, own, self.tensors(), self.context.control)

    def _metrics(self, done: int) -> dict[str, float | None]:
        """Returns the metrics of a checkpoint.

        With `checkpoint.best`, leaves out scores of an earlier step, so that a checkpoint without a score of its own step can't
        count as the best.
        """
        latest = self.context.latest
        scores = latest.scores if self.context.job.checkpoint.best is None or latest.scored_at == done else {}
        return {"train_loss": latest.loss, **scores}

    # restoring -------------------------------------------------------------------------------------------------------

    def restore(self, source: CopySource | None = None) -> None:
        """Loads the state before the attempt's first step: from in-memory checkpoints if there are any, else from storage."""
        if source:
            self._from_memory(source)
        else:
            self._from_storage()

    def _from_memory(self, source: CopySource) -> None:
        """Loads in-memory checkpoints. Frozen parameters come from storage, or keep their initial values."""
        context, node = self.context, ray.get_runtime_context().get_node_id()
        state = self.tensors(whole=True)
        # otherwise a worker's own copy has only a part of the state that it needs
        same = source.world == context.world and self.sharded.saves_all()

        def restore() -> tuple[CopyFacts, list[bytes]]:
            return memory_copies.restore(source, state, node, context.rank, same, context.progressed)

        facts, own = agreement.agreed(context.control, restore)
        if (frozen := self.sharded.frozen(whole=True)) and source.saved:
            saved = checkpoint.open_together(context.run_folder, source.saved, context.control)
            checkpoint.load(saved, dict(frozen), context.control, context.progressed)
            self.saver.frozen.loaded(saved, self.sharded.frozen())
        context.posts.notice(ResumeFacts(**facts.resume).apply(self.engine))
        if context.rank == 0:
            parts, events = zip(*map(wire.unpack, own), strict=True)
            self.unsealed.take_up(list(parts))
            context.posts.unsaved = events[0]

    def _from_storage(self) -> None:
        context, notice = self.context, self.context.posts.notice
        saved = checkpoint.open_together(context.run_folder, context.start_step, context.control)
        facts = RESUME.build(saved.index.resume, saved.location.join(INDEX))
        agreement.first(context.control, lambda: self._require_base(saved))
        state = self.tensors(whole=True)
        frozen = self.sharded.frozen(whole=True)
        if saved.frozen:
            state |= frozen
        elif frozen:
            notice(
                f"{saved.location}: the checkpoint has no frozen parameters, so the model's {len(frozen)} frozen parameters "
                f"keep the values from `build`"
            )
        checkpoint.load(saved, state, context.control, context.progressed)
        notice(checkpoint.casts(saved, state))
        self.saver.frozen.loaded(saved, self.sharded.frozen())
        notice(facts.apply(self.engine))
        self.unsealed.chain = saved.index.receipt.chain
        self.unsealed.replaced = saved.index.bad_samples if context.rank == 0 else 0

    def _require_base(self, saved: checkpoint.SavedCheckpoint) -> None:
        """Raises CheckpointError unless the checkpoint's adapter was trained on this run's base."""
        if not (base := self.sharded.base):
            return
        if saved.index.base is None:
            raise CheckpointError(f"{saved.location}: contains no adapter. Remove model.adapter, or use another name for the run")
        if not folder_digests.matches(base.folder, digest := base.digest, saved.index.base):
            raise CheckpointError(
                f"{saved.location}: this adapter was trained on another base than {base.folder} (digest {saved.index.base}, "
                f"found {digest}). Set model.pretrained to the base that the run began with"
            )
