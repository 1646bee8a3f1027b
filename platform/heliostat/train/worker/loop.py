"""Runs the training loop on every worker, around a DeepSpeed engine.

A step (`stepper`) follows from its number alone, so a resumed run needs no state but the checkpoint, and with the default lanes
(one per micro-batch) the same micro-batches are computed on any number of workers.

At every step the workers agree whether to stop behind it (`heartbeat`): when ordered to, they write a checkpoint and end as if
finished.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from typing import Any

import ray
import torch
import torch.distributed as dist

from heliostat.checkpoint import agreement
from heliostat.checkpoint import saver as checkpoint
from heliostat.config.spec import Job
from heliostat.data import stream
from heliostat.data.dataset import DataPlan, open_dataset
from heliostat.errors import LossSpikeError, NonFiniteError
from heliostat.events import Evaluation, Event, ModelPhase, Notice, Paused, Phase, Saved, Spike, Steps
from heliostat.lease import Fence
from heliostat.recipes import building
from heliostat.recipes.loading import load as load_recipe
from heliostat.recipes.protocol import Draws
from heliostat.storage import Location
from heliostat.track import local_curves
from heliostat.train.memory_keeper import Source
from heliostat.train.stop_codes import FAILED, RESIZE, RUN
from heliostat.train.time_ledger import Ledger, peak_flops
from heliostat.train.worker import bad_samples as quarantine
from heliostat.train.worker import collector, deepspeed_engine, ema, memory_copies, zero_state
from heliostat.train.worker import gallery as pictures
from heliostat.train.worker import loss_scale as lossscale
from heliostat.train.worker.batch_plan import BatchPlan
from heliostat.train.worker.evaluation import HeldOut
from heliostat.train.worker.heartbeat import Heartbeat, StopConsensus
from heliostat.train.worker.loss_spikes import Detector
from heliostat.train.worker.lr_schedule import factor
from heliostat.train.worker.memory_copies import MemoryCopies
from heliostat.train.worker.node_metrics import NodeMonitor
from heliostat.train.worker.recheck import Recheck
from heliostat.train.worker.sequence_group import SequenceGroup
from heliostat.train.worker.stepper import Stepper
from heliostat.train.worker.unsealed import Unsealed

HELD_POLL_S = 0.05


class Worker:
    """Trains in one attempt: `run` returns the attempt's summary (rank 0's is the one that counts)."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Builds the engine, in the process group of the attempt, and loads the checkpoint to start from.

        `config`: job, plan (plain data), start_step, pauses (steps), fence (of the driver's lease), mailbox (actor), run_folder,
        part (of the stream, this worker's; None if another reads for it), queued_s (how long the workers' resources were waited
        for), memory (the plan of the copies in memory, if the job wants any).
        """
        self.job = Job.model_validate(config["job"])
        self.plan = DataPlan.parse(config["plan"])
        self.mailbox = config["mailbox"]
        self.start_step: int = config["start_step"]
        self.pauses: list[int] = config["pauses"]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.ledger = Ledger("starting")
        self.heartbeat = Heartbeat(self.mailbox, self.rank, self.world)
        self.monitor = NodeMonitor(self.mailbox, ray.util.get_node_ip_address(), _nodes()) if _first_of_node() else None
        self.memory: MemoryCopies | None = None
        try:
            self._build(config)
        except BaseException:
            self.end()
            raise

    def _build(self, config: dict[str, Any]) -> None:
        self.run_folder = Location(config["run_folder"])
        # the training group is left to DeepSpeed; of this one the loop, the saving and the stop consensus have a channel each
        self.control = dist.new_group(backend="gloo")
        self.consensus = StopConsensus(self.control)
        plan, limit = config["memory"], self.job.checkpoint.memory_limit
        self.memory = MemoryCopies(plan, limit, self.rank, self.world, self._notice_of_any) if plan else None
        self.fence: Fence = config["fence"]
        self.saver = checkpoint.Saver(self.run_folder, self.job.checkpoint, self.control, self.fence, self._progressed)

        if self.rank == 0:
            waited, begun = config["queued_s"], self.ledger.totals()
            self._post(ModelPhase(queued_s=waited, start_step=self.start_step, workers=self.world, ledger=begun))
        deepspeed_engine.prepare_environment(self.job.workers.gpus)
        self.dataset = open_dataset(self.plan)
        self.sequence = SequenceGroup(self.job.train.parallel.sequence)
        self.samples: stream.LaneStream | None = self._opened(config["part"]) if self.sequence.reads else None
        self.recipe = load_recipe(self.job, self.dataset.sources)
        self.engine = deepspeed_engine.build_engine(self.job, self.recipe, self.sequence)
        zero_state.init_optimizer_state(self.engine)
        self.saver.attach(zero_state.inner_optimizer(self.engine))
        if self.memory:
            self.memory.attach(zero_state.inner_optimizer(self.engine))
        self.ema = ema.of(self.job, self.engine)
        self.device = self.engine.device
        self.batch_plan = BatchPlan(self.job, self.plan)
        self.stepper = Stepper(self.job, self.engine, self.recipe, self.batch_plan, self.sequence, self.ledger, self.ema)
        self.unsealed = Unsealed(self.run_folder, self.dataset, self.control, self.sequence.reads)
        self.skipped = 0  # steps of the run that changed no weight, because fp16 gradients overflowed
        self._told: list[Event] = []  # events of steps and scores since the last checkpoint
        if self.start_step:
            self._phase("restore")
            self._restore_from_memory(plan.source) if plan and plan.source else self._restore()
        self.held_out = HeldOut(self.job, self.dataset, self.recipe, self.sequence) if self.job.evaluate else None
        self.gallery = self.recipe.gallery() if self.job.evaluate and isinstance(self.recipe, Draws) else None
        self.scores: dict[str, float] = {}
        self.scored_at = -1
        self.recheck = self._rechecked() if self.job.train.recheck else None
        self.spikes = Detector(self.job.spike) if self.job.spike else None

    # one run ---------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        try:
            with collector.held_off():
                return self._run()
        finally:
            self.end()

    def end(self) -> None:
        """Ends the threads that report to the driver."""
        self.heartbeat.end()
        if self.monitor:
            self.monitor.end()
        if self.memory:
            self.memory.end()

    def _run(self) -> dict[str, Any]:
        job = self.job
        self._phase("data")
        since = time.perf_counter()
        logged = self.start_step
        steady_s = steady_wait = waited = 0.0
        for step in range(self.start_step, job.last_step):
            with self.ledger("data" if step > self.start_step else "starting"):
                mine = self._next_step()
            if step == self.start_step:
                self.ledger.switch("compiling" if job.train.compile else "computing")
                self._phase("step")
                since = time.perf_counter()
            if self.recheck and self.recheck.due(step):
                self._notice(self.recheck.look(step))
                self.heartbeat.progress += 1
            blocked = self._blocked_s()
            self.consensus.ask(FAILED if self.saver.failed else self.heartbeat.stop)
            self._step(step, mine)
            self.heartbeat.progress += 1
            stop = self.consensus.result()
            if stop == FAILED:
                self.saver.wait()  # raises on every worker
            if stop == RESIZE and (step + 1) % job.checkpoint.every:
                stop = RUN  # nobody is in a hurry: behind the next checkpoint
            self.ledger.move("computing", "checkpoint", self._blocked_s() - blocked)
            if job.train.compile and step <= self.start_step + 1:
                self.ledger.compiled(first=step == self.start_step)
            done = step + 1
            if step == self.start_step:
                self._phase("stepped")
            last = done == job.last_step
            holds = done in self.pauses and not last
            saves = last or stop != RUN or holds or done % job.checkpoint.every == 0
            keeps = self.memory is not None and not last and (saves or done % (job.checkpoint.memory_every or 1) == 0)
            if self.memory and keeps:
                with self.ledger("checkpoint"):  # before the report, behind which all copies up to here have arrived
                    self.memory.wait()
            # before a save, too: a run that resumes from there has lost no step's loss
            if done % job.train.log_every == 0 or saves or keeps or step == self.start_step:
                now = time.perf_counter()
                waited, before = self.ledger.totals().get("data", 0.0), waited
                wait = waited - before
                if step > self.start_step:
                    steady_s, steady_wait = steady_s + now - since, steady_wait + wait
                self._report(logged, done, now - since, wait)
                logged, since = done, now
            aside = time.perf_counter()
            if self.held_out and (done % job.evaluate.every == 0 or last):  # type: ignore[union-attr]
                with self.ledger("evaluating"):
                    self._evaluate(done)
            if saves:
                with self.ledger("checkpoint"):
                    self._save(done)
            if keeps:
                with self.ledger("checkpoint"):
                    self._keep(done)
            self._collect(done, saves)
            if holds and stop == RUN:
                stop = self._hold(done)
            since += time.perf_counter() - aside
            if stop != RUN:
                break
        with self.ledger("checkpoint"):
            self.saver.wait()
            if self.memory:
                self.memory.wait()
        self._phase("ended")
        trained = done - self.start_step - 1  # the first step warms up
        return {
            "steps": done,
            "stop": stop if done < job.last_step else RUN,
            "train_loss": self.last_loss,
            "eval": self.scores,
            "tokens_per_second": self._per_second(trained, steady_s),
            "data_wait": steady_wait / steady_s if steady_s else 0.0,
            "checkpoint_blocked_s": self.saver.blocked_s,
        }

    def _collect(self, done: int, saved: bool) -> None:
        """Collects garbage behind a step, all of it where training has stopped anyway."""
        if saved or self.scored_at == done:
            collector.collect_all()
        elif done % collector.EVERY == 0:
            collector.collect_new()

    def _opened(self, part: Any) -> stream.LaneStream:
        replica, replicas = self.sequence.replica, self.sequence.replicas
        return stream.iterate(part, self.plan, self.dataset.order, replica, replicas, self.start_step)

    def _next_step(self) -> stream.StepSamples:
        """Takes the next step's samples, which the workers that share them get from the one that reads them."""
        return self.sequence.share(self._read)

    def _read(self) -> stream.StepSamples:
        assert self.samples
        return self.samples.next_step()

    def _step(self, step: int, mine: stream.StepSamples) -> None:
        norm = self.stepper.step(step, mine)
        self.unsealed.add(step, mine)
        if self.job.train.precision != "fp16" and not math.isfinite(norm):  # fp16's loss scaler skips such steps itself
            self._fail(step, f"gradient norm {norm}")

    def _rechecked(self) -> Recheck:
        where = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        return Recheck(self.job, self.engine, self.recipe, self.dataset, self.batch_plan, self.control, where)

    def _report(self, first: int, done: int, seconds: float, wait: float) -> None:
        """Posts what steps [first, done) gave, summed over the workers; collective."""
        found = self.stepper.report(self.control, self.unsealed.replaced)
        quarantine.check_budget(found.replaced, done, self.job, self.dataset.order)
        self._judge(first, found.losses)
        self.last_loss = found.losses[-1]
        rate = self._per_second(done - first, seconds)
        schedule, peak = self.job.train.schedule, self.job.train.optimizer.lr
        skipped, scale = self._fp16(done)
        self._tell(
            Steps(
                first=first,
                loss=found.losses,
                added=found.added,
                experts=found.experts,
                grad_norm=found.norms,
                lr=[peak * factor(schedule, s, self.job.train.steps) for s in range(first, done)],
                seconds=seconds,
                tokens_per_second=rate,
                data_wait=wait / seconds,
                mfu=self._mfu(done - first, seconds),
                bad_samples=found.replaced,
                skipped_steps=skipped,
                loss_scale=scale,
                ledger=self.ledger.totals(),
            )
        )

    def _fp16(self, done: int) -> tuple[int | None, float | None]:
        """Counts the steps skipped so far by fp16's loss scale, and reads the scale; new skips are reported at the terminal."""
        if self.job.train.precision != "fp16":
            return None, None
        before, self.skipped = self.skipped, done - zero_state.optimizer_steps(self.engine)
        scale = float(self.engine.optimizer.loss_scale)
        if self.skipped > before:
            what = f"{self.skipped - before} more steps were skipped, because fp16 gradients overflowed"
            self._notice(f"up to step {done}: {what}; the loss scale is {scale:g}")
        return self.skipped, scale

    def _per_second(self, steps: int, seconds: float) -> float:
        return steps * self.job.train.global_batch * (self.job.data.sequence_length or 1) / seconds if seconds else 0.0

    def _mfu(self, steps: int, seconds: float) -> float | None:
        if self.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.device), self.job.train.precision)
        flops = self.recipe.flops_per_sample(self.engine.module)
        return flops * self.job.train.global_batch * steps / seconds / (peak * self.world) if peak and flops else None

    def _judge(self, first: int, losses: list[float]) -> None:
        """Raises what ends the attempt for a loss that is not finite, or a spike that the job wants undone. Collective."""
        for step, loss in enumerate(losses, first):
            spike = self.spikes.spikes(loss) if self.spikes else None
            if not math.isfinite(loss):
                self._fail(step, f"loss {loss}")
            elif spike and self.job.spike:
                action = self.job.spike.action
                self._tell(Spike(step=step + 1, action=action, **spike._asdict()))
                if action == "rollback":
                    self._roll_back(step, str(spike))

    def _roll_back(self, step: int, what: str) -> None:
        self.saver.wait()  # the save in flight is from before
        raise LossSpikeError(f"step {step + 1}: {what}", step)

    def _fail(self, step: int, what: str) -> None:
        if self.job.spike and self.job.spike.action == "rollback":
            self._roll_back(step, what)
        ids = self.dataset.order.locate(self.dataset.order.step(step).ravel())
        names = [f"{s}:{c}:{r}" for s, c, r in zip(ids.source[:8], ids.chunk[:8], ids.row[:8], strict=True)]
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        self.saver.wait()  # the save in flight is from before: let it complete
        raise NonFiniteError(
            f"step {step + 1}: {what}; training stopped before another checkpoint. Samples (source:chunk:row): "
            f"{', '.join(names)}{more}. Lower train.optimizer.lr, or look at the data, and use --resume"
        )

    # evaluation ------------------------------------------------------------------------------------------------------

    def _evaluate(self, done: int) -> None:
        assert self.held_out
        self.engine.eval()
        images: dict[str, bytes] = {}
        with self.ema.applied() if self.ema else nullcontext():
            self.scores = self.held_out.scores(self.engine, self.device, self.control, self._progressed)
            self.scored_at = done
            if self.gallery:
                judged, images = pictures.show(self.gallery, self.engine, self.device, self.control, self._progressed)
                self.scores |= judged
        self.engine.train()
        building.rest(self.recipe, self.engine.module)
        self._tell(Evaluation(step=done, scores=self.scores, images=images))

    def _progressed(self) -> None:
        self.heartbeat.progress += 1

    # checkpoints -----------------------------------------------------------------------------------------------------

    def _save(self, done: int) -> None:

        def first() -> None:
            self.fence.check()
            local_curves.write(self.run_folder, done, self._told)

        bad = self.unsealed.seal(done, first)
        self._told = []
        best = self.job.checkpoint.best  # a checkpoint out of turn was not scored, and is not to be taken for the best
        scores = self.scores if best is None or self.scored_at == done else {}
        facts = {
            "name": self.job.name,
            "world_size": self.world,
            "zero_stage": self.job.train.zero.stage,
            "optimizer_steps": zero_state.optimizer_steps(self.engine),
            "loss_scale": lossscale.read(self.engine),
            "job": self.job.dump(),
            "data": self.plan.dump(),
            "data_digest": self.plan.digest,
            "receipt": {"steps": done, "chain": self.unsealed.chain},
            "bad_samples": bad,
            "metrics": {"train_loss": getattr(self, "last_loss", None), **scores},
            "written": time.time(),
        }
        self.saver.save(done, self._state(), facts, zero_state.frozen(self.engine))
        self.heartbeat.progress += 1
        self._post(Saved(step=done, blocked_s=self.saver.blocked_s, ledger=self.ledger.totals()))

    def _hold(self, done: int) -> int:
        """Waits behind a complete checkpoint for the driver's decision: RUN, or the code of a stop, the same on every worker."""
        with self.ledger("checkpoint"):
            self.saver.wait()
        with self.ledger("idle"):
            self._post(Paused(step=done, scores=self.scores, ledger=self.ledger.totals()))
            while (decision := ray.get(self.mailbox.decision.remote(done))) is None:
                self.heartbeat.progress += 1  # the watchdog is not to take this for a stall
                time.sleep(HELD_POLL_S)
        return decision

    def _keep(self, done: int) -> None:
        """Keeps the state behind a step in memory, with all that a checkpoint and its receipt would tell of the step."""
        assert self.memory
        common = {
            "optimizer_steps": zero_state.optimizer_steps(self.engine),
            "loss_scale": lossscale.read(self.engine),
            "data": self.plan.digest,
        }
        self.memory.keep(done, self._state(), common, {**self.unsealed.kept(), "told": list(self._told)}, self.control)

    def _restore_from_memory(self, source: Source) -> None:
        """Loads the state from copies in memory; parameters that are not trained come from storage, or are as they were built."""
        state, node = self._state(whole=True), ray.get_runtime_context().get_node_id()
        alone = zero_state.alike(self.engine)[1] == 1  # else a worker copied a part of what it needs
        same = source.world == self.world and alone

        def restore() -> Any:
            return memory_copies.restore(source, state, node, self.rank, same, self._progressed)

        common, own = agreement.agreed(self.control, restore)
        if (frozen := zero_state.frozen(self.engine, whole=True)) and source.saved:
            found = checkpoint.open_together(self.run_folder, source.saved, self.control)
            checkpoint.load(found, dict(frozen), self.control, self._progressed)
            self.saver.frozen.loaded(found, zero_state.frozen(self.engine))
        self._resume(common["optimizer_steps"], common["loss_scale"])
        if self.rank == 0:
            self.unsealed.take_up(own)
            self._told = own[0]["told"]

    def _resume(self, optimizer_steps: int, loss_scale: Any) -> None:
        """Completes the engine after its state was loaded."""
        zero_state.after_load(self.engine, optimizer_steps)
        self._notice(lossscale.write(self.engine, loss_scale))
        self.skipped = self.start_step - optimizer_steps

    def _state(self, whole: bool = False) -> dict[str, torch.Tensor]:
        return zero_state.state(self.engine, whole) | (self.ema.state(whole) if self.ema else {})

    def _restore(self) -> None:
        found = checkpoint.open_together(self.run_folder, self.start_step, self.control)
        state = self._state(whole=True)
        frozen = zero_state.frozen(self.engine, whole=True)
        if found.frozen:
            state |= frozen
        elif frozen:
            self._notice(f"{found.location}: holds no parameters that are not trained; {len(frozen)} are as the model was built")
        checkpoint.load(found, state, self.control, self._progressed)
        self._notice(checkpoint.casts(found, state))
        self.saver.frozen.loaded(found, zero_state.frozen(self.engine))
        self._resume(found.index["optimizer_steps"], found.index.get("loss_scale"))
        self.unsealed.chain = found.index["receipt"]["chain"]
        self.unsealed.replaced = found.index["bad_samples"] if self.rank == 0 else 0

    def _notice(self, text: str | None) -> None:
        """Posts a notice for the user at the terminal, if there is one."""
        if text:
            self._post(Notice(text=text))

    def _notice_of_any(self, text: str) -> None:
        """Posts a notice that is not rank 0's alone."""
        self.mailbox.post.remote(Notice(text=text))

    def _blocked_s(self) -> float:
        return self.saver.blocked_s + (self.memory.blocked_s if self.memory else 0.0)

    def _phase(self, phase: str) -> None:
        self._post(Phase(phase=phase, ledger=self.ledger.totals()))

    def _tell(self, event: Event) -> None:
        """Posts an event that must not be lost, even if the driver dies before it has it."""
        self._told.append(event)
        self._post(event)

    def _post(self, event: Event) -> None:
        if self.rank == 0:
            self.mailbox.post.remote(event)


def _first_of_node() -> bool:
    return os.environ["LOCAL_RANK"] == "0"


def _nodes() -> int:
    """Computes the number of nodes that the workers are on, if all have as many as this one."""
    return max(1, round(int(os.environ["WORLD_SIZE"]) / int(os.environ["LOCAL_WORLD_SIZE"])))
