"""Builds a worker's components for one attempt around a DeepSpeed engine, and runs the loop of steps (`step`) with its hooks."""

from __future__ import annotations

import os

import ray
import torch.distributed as dist
from ray.data import DataIterator
from typing_extensions import TypedDict

from heliostat.config.spec import Job
from heliostat.data import stream
from heliostat.data.dataset import DataPlan, open_dataset
from heliostat.engine import deepspeed_engine, process_group
from heliostat.engine.sample_group import SampleGroup
from heliostat.recipes.loading import load as load_recipe
from heliostat.runs.events import ModelPhase
from heliostat.runs.time_ledger import Ledger
from heliostat.storage.lease import Fence
from heliostat.storage.locations import Location
from heliostat.training.mailbox import AttemptMailbox
from heliostat.training.memory_keeper import MemoryPlan
from heliostat.training.stops import RUN
from heliostat.training.worker import collector
from heliostat.training.worker.collector import Collector
from heliostat.training.worker.context import Context, Hook, Posts
from heliostat.training.worker.evaluation import Evaluations
from heliostat.training.worker.heartbeat import Heartbeat
from heliostat.training.worker.loss_watch import LossWatch
from heliostat.training.worker.memory_copies import MemoryCopies
from heliostat.training.worker.micro_batches import BatchesAhead, BatchPlan
from heliostat.training.worker.node_metrics import NodeMonitor
from heliostat.training.worker.profiler import StepProfiler
from heliostat.training.worker.recheck import CorruptionCheck
from heliostat.training.worker.step import Loop, Stepper
from heliostat.training.worker.step_reports import StepReports, StepsSummary, TrainedTokens
from heliostat.training.worker.training_state import TrainingState
from heliostat.training.worker.unsealed import Unsealed


class WorkerConfig(TypedDict):
    """Describes a worker's inputs for an attempt.

    `job`, `plan`: plain data. `pauses`: steps. `fence`: the fence of the driver's lease. `part`: this worker's part of the
    stream, or None if another worker reads for this worker. `queued_s`: seconds that the run waited for the workers' resources.
    `memory`: the plan of in-memory checkpoints, or None if the job wants none.
    """

    job: dict[str, object]
    plan: dict[str, object]
    start_step: int
    pauses: list[int]
    fence: Fence
    mailbox: AttemptMailbox
    run_folder: str
    queued_s: float
    memory: MemoryPlan | None
    part: DataIterator | None


class WorkerSummary(StepsSummary):
    """Describes the results of a worker's attempt. The driver uses rank 0's."""

    steps: int
    stop: int
    eval: dict[str, float]
    checkpoint_blocked_s: float


class Worker:
    """Trains as one rank of an attempt."""

    def __init__(self, config: WorkerConfig) -> None:
        """Builds the engine in the attempt's process group, and loads the checkpoint to start from."""
        self.job, self.rank, mailbox = Job.model_validate(config["job"]), dist.get_rank(), config["mailbox"]
        self.ledger, self.posts = Ledger("starting"), Posts(mailbox, self.rank)
        self.heartbeat = Heartbeat(mailbox, self.rank, dist.get_world_size())
        self.profiler = StepProfiler(Location(config["run_folder"]), self.heartbeat, self.posts)
        first_of_node = os.environ["LOCAL_RANK"] == "0"
        self.monitor = NodeMonitor(mailbox, ray.util.get_node_ip_address(), _nodes()) if first_of_node else None
        self.memory: MemoryCopies | None = None
        self.ahead: BatchesAhead | None = None
        try:
            self._build(config)
        except BaseException:
            self.end()
            raise

    def _build(self, config: WorkerConfig) -> None:
        job, posts, ledger, copies = self.job, self.posts, self.ledger, config["memory"]
        plan, world, folder = DataPlan.parse(config["plan"]), dist.get_world_size(), Location(config["run_folder"])
        # DeepSpeed uses the training group; in this group, the loop, the saver, and the stop consensus have one channel each
        control, start_step = dist.new_group(backend="gloo"), config["start_step"]
        if copies:
            self.memory = MemoryCopies(copies, job.checkpoint.memory_limit, self.rank, world, posts.notice_of_any)
        context = self.context = Context(
            job, plan, folder, start_step, self.rank, world, control, config["fence"], posts, self._progressed, ledger
        )
        waited = config["queued_s"]
        posts.post(ModelPhase(queued_s=waited, start_step=start_step, workers=world, ledger=ledger.totals()))
        deepspeed_engine.prepare_environment(job.workers.gpus)
        dataset, sharing = open_dataset(plan), SampleGroup(job.train.parallel)
        samples: stream.LaneStream | None = None
        if (part := config["part"]) is not None:
            samples = stream.iterate(part, plan, dataset.order, sharing.replica, sharing.replicas, start_step)
        recipe = load_recipe(job, dataset.sources)
        engine = deepspeed_engine.build_engine(job, recipe, sharing)
        unsealed = Unsealed(folder, dataset, control, sharing.reads)
        state = self.state = TrainingState(context, engine, unsealed, self.memory)
        batches = BatchPlan(job, plan)
        stepper = Stepper(job, engine, recipe, batches, sharing, ledger, state.average, self._handed)
        if start_step:
            context.phase("restore")
            state.restore(copies.source if copies else None)
        hooks: list[Hook] = [self.profiler, LossWatch(context, dataset, state.settle, stepper.untrained)]
        if job.train.sdc_check:
            where = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
            hooks.append(CorruptionCheck(context, engine, recipe, dataset, batches, where))
        if job.evaluate:
            hooks.append(Evaluations(context, state, recipe, dataset, sharing))  # before a save, which records the scores
        hooks += [state, Collector()]
        self.reports = StepReports(context, engine, recipe, unsealed, hooks, stepper.report,
                                   TrainedTokens(recipe, dataset.order, sharing.counts))  # fmt: skip

        def read() -> stream.StepSamples:
            """Takes the next step's samples. Called only on the worker that reads for its group."""
            assert samples
            return samples.next_step()

        self.ahead = BatchesAhead(lambda: sharing.share(read), stepper.prepare, posts.notice)
        self.loop = Loop(context, stepper, unsealed, self.reports, self.heartbeat, hooks, config["pauses"], self.ahead)

    def run(self) -> WorkerSummary:
        """Trains to the last step, or until the workers stop. Returns the summary."""
        with collector.held_off():
            self.context.phase("data")
            done, stop = self.loop.run()
            self.profiler.finish()
            # here, because the other workers wait for the last save anyway; later, they would wait only for the profiler
            self.profiler.wait(progressed=self._progressed)
            with self.ledger("checkpoint"):
                self.state.wait()
            self.context.phase("ended")
            return {
                "steps": done,
                "stop": stop if done < self.job.last_step else RUN,
                "eval": self.context.latest.scores,
                "checkpoint_blocked_s": self.state.saver.blocked_s,
                **self.reports.summary(done),
            }

    def end(self) -> None:
        """Ends the threads that send heartbeats and metrics, make batches, and copy into memory.

        If the device is broken, the thread that copies may never end.
        """
        self.heartbeat.end()
        self.profiler.end()
        if self.ahead:
            self.ahead.end()
        if self.monitor:
            self.monitor.end()
        if self.memory:
            self.memory.end()

    @property
    def busy(self) -> bool:
        """Returns whether one of the threads is still saving a checkpoint or making batches."""
        return self.state.saver.busy or (self.ahead is not None and self.ahead.busy)

    def _progressed(self) -> None:
        """Counts progress for the watchdog. Raises PeerLostError once the workers are ordered to abort."""
        process_group.check()
        self.heartbeat.progress += 1

    def _handed(self) -> None:
        """Counts a micro-batch that the host has handed to the device."""
        self.heartbeat.micro += 1
        self._progressed()


def _nodes() -> int:
    """Computes the number of nodes that the workers run on. Assumes that every node has as many workers as this worker's node."""
    return max(1, round(int(os.environ["WORLD_SIZE"]) / int(os.environ["LOCAL_WORLD_SIZE"])))
