"""Runs the training loop on every worker, around a DeepSpeed engine.

A step (`stepper`) follows from its number alone, so a resumed run needs no state but the checkpoint, and with the default lanes
(one per micro-batch) the same micro-batches are computed on any number of workers.

At every step the workers agree whether to stop behind it (`heartbeat`): when ordered to, they write a checkpoint and end as if
finished.
"""

from __future__ import annotations

import os
import time
from typing import Any

import ray
import torch.distributed as dist

from heliostat.config.spec import Job
from heliostat.data import stream
from heliostat.data.dataset import DataPlan, open_dataset
from heliostat.engine import deepspeed_engine, process_group
from heliostat.engine.sample_group import SampleGroup
from heliostat.recipes import building
from heliostat.recipes.loading import load as load_recipe
from heliostat.recipes.protocol import Draws
from heliostat.runs.events import Evaluation, ModelPhase, Paused, Phase
from heliostat.runs.time_ledger import Ledger
from heliostat.storage.locations import Location
from heliostat.training.stop_codes import FAILED, RESIZE, RUN
from heliostat.training.worker import collector
from heliostat.training.worker import gallery as pictures
from heliostat.training.worker.batch_plan import BatchPlan
from heliostat.training.worker.context import Context
from heliostat.training.worker.evaluation import HeldOut
from heliostat.training.worker.heartbeat import Heartbeat, StopConsensus
from heliostat.training.worker.loss_watch import LossWatch
from heliostat.training.worker.memory_copies import MemoryCopies
from heliostat.training.worker.node_metrics import NodeMonitor
from heliostat.training.worker.posts import Posts
from heliostat.training.worker.recheck import CorruptionCheck
from heliostat.training.worker.step_reports import StepReports
from heliostat.training.worker.stepper import Stepper
from heliostat.training.worker.training_state import TrainingState
from heliostat.training.worker.unsealed import Unsealed

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
        self.posts = Posts(self.mailbox, self.rank)
        self.heartbeat = Heartbeat(self.mailbox, self.rank, self.world)
        self.monitor = NodeMonitor(self.mailbox, ray.util.get_node_ip_address(), _nodes()) if _first_of_node() else None
        self.memory: MemoryCopies | None = None
        try:
            self._build(config)
        except BaseException:
            self.end()
            raise

    def _build(self, config: dict[str, Any]) -> None:
        job, plan, rank, world, posts = self.job, self.plan, self.rank, self.world, self.posts
        # the training group is left to DeepSpeed; of this one the loop, the saving and the stop consensus have a channel each
        self.control = dist.new_group(backend="gloo")
        self.consensus = StopConsensus(self.control)
        copies, limit = config["memory"], job.checkpoint.memory_limit
        self.memory = MemoryCopies(copies, limit, rank, world, posts.notice_of_any) if copies else None
        folder = Location(config["run_folder"])
        self.context = Context(
            job, plan, folder, self.start_step, rank, world, self.control, config["fence"], posts, self._progressed
        )
        waited, begun = config["queued_s"], self.ledger.totals()
        posts.post(ModelPhase(queued_s=waited, start_step=self.start_step, workers=world, ledger=begun))
        deepspeed_engine.prepare_environment(job.workers.gpus)
        self.dataset = open_dataset(plan)
        self.sharing = SampleGroup(job.train.parallel)
        self.samples = self._opened(config["part"]) if self.sharing.reads else None
        self.recipe = load_recipe(job, self.dataset.sources)
        self.engine = deepspeed_engine.build_engine(job, self.recipe, self.sharing)
        self.device = self.engine.device
        self.unsealed = Unsealed(folder, self.dataset, self.control, self.sharing.reads)
        self.state = TrainingState(self.context, self.engine, self.unsealed, self.ledger, self.memory)
        self.batch_plan = BatchPlan(job, plan)
        self.stepper = Stepper(
            job, self.engine, self.recipe, self.batch_plan, self.sharing, self.ledger, self.state.average, self._handed
        )
        if self.start_step:
            self._phase("restore")
            self.state.restore(copies.source if copies else None)
        self.held_out = HeldOut(job, self.dataset, self.recipe, self.sharing) if job.evaluate else None
        self.gallery = self.recipe.gallery() if job.evaluate and isinstance(self.recipe, Draws) else None
        self.scores: dict[str, float] = {}
        self.scored_at = -1
        self.recheck = self._rechecked() if job.train.recheck else None
        self.watch = LossWatch(self.context, self.dataset, self.state.settle)
        self.reports = StepReports(self.context, self.stepper, self.dataset, self.watch, self.ledger)

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

    @property
    def busy(self) -> bool:
        """Tells whether a save goes on in its thread."""
        return self.state.saver.busy

    def _run(self) -> dict[str, Any]:
        self._phase("data")
        done, stop = self.start_step, RUN
        while done < self.job.last_step and stop == RUN:
            stop = self._make(done)
            done += 1
            stop = self._follow(done, stop)
        with self.ledger("checkpoint"):
            self.state.wait()
        self._phase("ended")
        return {
            "steps": done,
            "stop": stop if done < self.job.last_step else RUN,
            "eval": self.scores,
            "checkpoint_blocked_s": self.state.saver.blocked_s,
            **self.reports.summary(done),
        }

    def _make(self, step: int) -> int:
        """Makes a step, counted from 0; returns the stop code that the workers agree on meanwhile."""
        first = step == self.start_step
        with self.ledger("starting" if first else "data"):
            mine = self._next_step()
        if first:
            self.ledger.switch("compiling" if self.job.train.compile else "computing")
            self._phase("step")
            self.reports.begin()
        if self.recheck and self.recheck.due(step):
            self.posts.notice(self.recheck.look(step))
            self._progressed()
        blocked = self.state.blocked_s
        self.consensus.ask(FAILED if self.state.saver.failed else self.heartbeat.stop)
        self.heartbeat.step, self.heartbeat.micro = step + 1, 0
        norm = self.stepper.step(step, mine)
        self._progressed()  # before the step counts
        self.unsealed.add(step, mine)
        self.watch.check_norm(step, norm)
        stop = self.consensus.result()
        if stop == FAILED:
            self.state.settle()  # raises on every worker, or on none
            stop = RUN
        self.ledger.move("computing", "checkpoint", self.state.blocked_s - blocked)
        if self.job.train.compile and step <= self.start_step + 1:
            self.ledger.compiled(first=first)
        if first:
            self._phase("stepped")
        if stop == RESIZE and (step + 1) % self.job.checkpoint.every:
            return RUN  # nobody is in a hurry: behind the next checkpoint
        return stop

    def _follow(self, done: int, stop: int) -> int:
        """Reports, evaluates, saves and waits behind step `done`, as far as each is due; returns the stop code."""
        job, last = self.job, done == self.job.last_step
        holds = done in self.pauses and not last
        saves = last or stop != RUN or holds or done % job.checkpoint.every == 0
        keeps = self.memory is not None and not last and (saves or done % (job.checkpoint.memory_every or 1) == 0)
        if self.memory and keeps:
            with self.ledger("checkpoint"):  # before the report, behind which all copies up to here have arrived
                self.memory.wait()
        # before a save, too: a run that resumes from there has lost no step's loss
        if done % job.train.log_every == 0 or saves or keeps or done == self.start_step + 1:
            self.reports.report(done, self.unsealed.replaced)
        with self.reports.aside():
            if job.evaluate and (done % job.evaluate.every == 0 or last):
                with self.ledger("evaluating"):
                    self._evaluate(done)
            if saves:
                with self.ledger("checkpoint"):
                    self.state.save(done, self._metrics(done))
            if keeps:
                with self.ledger("checkpoint"):
                    self.state.keep(done)
            self._collect(done, saves)
            if holds and stop == RUN:
                stop = self._hold(done)
        return stop

    def _collect(self, done: int, saved: bool) -> None:
        """Collects garbage behind a step, all of it where training has stopped anyway."""
        if saved or self.scored_at == done:
            collector.collect_all()
        elif done % collector.EVERY == 0:
            collector.collect_new()

    def _opened(self, part: Any) -> stream.LaneStream:
        replica, replicas = self.sharing.replica, self.sharing.replicas
        return stream.iterate(part, self.plan, self.dataset.order, replica, replicas, self.start_step)

    def _next_step(self) -> stream.StepSamples:
        """Takes the next step's samples, which the workers that share them get from the one that reads them."""
        return self.sharing.share(self._read)

    def _read(self) -> stream.StepSamples:
        assert self.samples
        return self.samples.next_step()

    def _rechecked(self) -> CorruptionCheck:
        where = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        return CorruptionCheck(self.job, self.engine, self.recipe, self.dataset, self.batch_plan, self.control, where)

    def _evaluate(self, done: int) -> None:
        assert self.held_out
        self.engine.eval()
        images: dict[str, bytes] = {}
        with self.state.averaged():
            self.scores = self.held_out.scores(self.engine, self.device, self.control, self._progressed)
            self.scored_at = done
            if self.gallery:
                judged, images = pictures.show(self.gallery, self.engine, self.device, self.control, self._progressed)
                self.scores |= judged
        self.engine.train()
        building.rest(self.recipe, self.engine.module)
        self.posts.tell(Evaluation(step=done, scores=self.scores, images=images))

    def _metrics(self, done: int) -> dict[str, float | None]:
        """Returns the metrics of a checkpoint: one out of turn was not scored, and is not to be taken for the best."""
        scores = self.scores if self.job.checkpoint.best is None or self.scored_at == done else {}
        return {"train_loss": self.reports.last_loss, **scores}

    def _hold(self, done: int) -> int:
        """Waits behind a complete checkpoint for the driver's decision: RUN, or the code of a stop, the same on every worker."""
        with self.ledger("checkpoint"):
            self.state.saver.wait()
        with self.ledger("idle"):
            self.posts.post(Paused(step=done, scores=self.scores, ledger=self.ledger.totals()))
            while (decision := ray.get(self.mailbox.decision.remote(done))) is None:
                self._progressed()  # the watchdog is not to take this for a stall
                time.sleep(HELD_POLL_S)
        return decision

    def _progressed(self) -> None:
        """Counts progress, for the watchdog; PeerLostError once the workers were ordered to abort."""
        process_group.check()
        self.heartbeat.progress += 1

    def _handed(self) -> None:
        """Counts a micro-batch that the host has handed to the device."""
        self.heartbeat.micro += 1
        self._progressed()

    def _phase(self, phase: str) -> None:
        self.posts.post(Phase(phase=phase, ledger=self.ledger.totals()))


def _first_of_node() -> bool:
    return os.environ["LOCAL_RANK"] == "0"


def _nodes() -> int:
    """Computes the number of nodes that the workers are on, if all have as many as this one."""
    return max(1, round(int(os.environ["WORLD_SIZE"]) / int(os.environ["LOCAL_WORLD_SIZE"])))
