"""Runs one attempt at a training run: starts the pool's workers, and watches them from the driver until they end.

The driver's thread never waits for long. The thread drains the mailbox. It orders the workers to stop after a checkpoint in three
cases: a user asks for a stop, a node's provider takes a node away, or the cluster has room for more workers. If no worker makes
progress any more, the thread ends the workers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import ray
from ray.data import DataIterator

from heliostat.cluster import nodes
from heliostat.config.spec import Job
from heliostat.data import stream
from heliostat.data.dataset import DataPlan, sample_bytes
from heliostat.data.manifest import Manifest
from heliostat.data.node_streams import NodeStreams, StreamLimits
from heliostat.data.order import Order
from heliostat.engine.process_group import WorkerPlace
from heliostat.errors import ConfigError, HeliostatError, LeaseError, StalledError, TrainingError
from heliostat.runs.events import Event, Paused, Phase, Waiting, WorkerFailed
from heliostat.storage import run_folder
from heliostat.storage.lease import Fence
from heliostat.text import brief
from heliostat.training import mailbox
from heliostat.training.driver import orders, watchdog
from heliostat.training.driver.failures import Ended, Failure, explain, survived
from heliostat.training.driver.memory import Memory
from heliostat.training.driver.pool import Member, WorkerPool, places
from heliostat.training.driver.profiles import ProfileRequests
from heliostat.training.driver.recovery import choose
from heliostat.training.driver.signals import Signals
from heliostat.training.mailbox import AttemptMailbox
from heliostat.training.memory_keeper import CopySource, MemoryPlan
from heliostat.training.stops import PREEMPTED, PausePoints

if TYPE_CHECKING:
    from heliostat.training.worker.build import WorkerConfig, WorkerSummary

log = logging.getLogger(__name__)

POLL_S = 0.5
HELD_POLL_S = 0.05  # seconds between two polls while the workers wait at a pause point
LOOK_S = 1.0  # seconds between two checks of the nodes and the workers' heartbeats
GROW_S = 5.0  # seconds between two checks for more room
END_S = 120.0  # seconds for killed workers to end
SETTLE_S = 10.0  # seconds for the other workers to return after a worker has failed; then the driver ends them


@dataclass(frozen=True)
class Start:
    """Holds the inputs of an attempt.

    `mailbox`: sends messages with the attempt's number. `job`: has a fixed worker count. `counts`: the numbers of workers with
    which the run may continue later.
    """

    mailbox: AttemptMailbox
    job: Job
    counts: list[int]
    plan: DataPlan
    order: Order
    manifests: list[Manifest]
    step: int
    fence: Fence
    memory: Memory
    source: CopySource | None = None  # in-memory checkpoints to start from; None: the checkpoint of `step`
    pauses: PausePoints = field(default_factory=PausePoints)


class Attempt:
    def __init__(
        self, start: Start, pool: WorkerPool, signals: Signals, take: Callable[[int, Event], None], beat: Callable[[], None]
    ) -> None:
        """Prepares the attempt.

        The function `take` is called with every event of the mailbox, in order, and with the number of the event's attempt.
        `beat` is called often. Both run in the thread that calls `run`.
        """
        self.start, self.job, self.pool, self.signals, self._hand_over, self._beat = start, start.job, pool, signals, take, beat
        self._mailbox = start.mailbox
        self._streams = self._opened()
        self._draining: ray.ObjectRef[mailbox.Drained] | None = None
        self._heartbeats: dict[int, mailbox.Pulse] = {}
        self._reported: dict[int, HeliostatError] = {}  # each worker's own error, by rank
        self._members: list[Member] = []  # the workers' processes, in order of their ranks
        self._watch = orders.WorkerWatch(self.job.checkpoint.grace, SETTLE_S, mailbox.interval(self.job.workers.most))
        self._deciding = threading.Lock()  # guards the watch, which two threads change
        self._since = time.monotonic()  # when the current watch for stalls began
        self._paused_at: int | None = None  # the step of the pause point at which the workers wait
        self._look_at = self._grow_at = 0.0
        self._starved = False  # whether a shortage for reading was reported
        self._placing, self._reading = nodes.Shortage(self.job), 0.0  # `_reading`: when opening the stream began

    def run(self) -> WorkerSummary:
        """Runs the workers until they end. Returns rank 0's summary, with the stop code if the workers were ordered to stop.

        Raises a HeliostatError if the attempt fails.
        """
        profiles = ProfileRequests(
            self.job.run_folder, self.job.workers.most, lambda request: self._mailbox.order({"profile": request})
        )
        profiles.begin()
        try:
            return self._run()
        finally:
            profiles.end()
            self._streams.end()

    def _run(self) -> WorkerSummary:
        outcome: Future[Ended] = Future()

        def train() -> None:
            try:
                outcome.set_result(self._train())
            except Exception as e:  # noqa: BLE001 (raised again below, in the caller's thread)
                outcome.set_exception(e)

        thread = threading.Thread(target=train, name="train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S if self._paused_at is None else HELD_POLL_S)
            try:
                self._beat()
            except (LeaseError, ConfigError) as e:  # ConfigError: the price of a worker isn't known
                self._decide(orders.FaultFound(e))
            self._drain()
            self._release()
            if thread.is_alive() and time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + LOOK_S
                self._look()
            if self._watch.fault:
                self._end_workers(thread)
                raise self._watch.fault
        self._drain()
        ended = outcome.result()
        if ended.summary is not None:
            return ended.summary
        raise explain([replace(f, reported=self._reported.get(f.rank)) for f in ended.failures])

    # the watch -------------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        for event in self._drained():
            if isinstance(event, Phase):
                self._decide(orders.PhaseBegun(event.phase))
                if event.phase == "data":
                    self._reading = time.monotonic()
                if event.phase in ("model", "stepped"):
                    self._since = time.monotonic()
            elif isinstance(event, Paused):
                self._paused_at = event.step
            self._take(event)

    def _drained(self) -> list[Event]:
        """Drains the mailbox and returns this attempt's events. Stores the heartbeats, with ages converted to times of this
        clock."""
        self._draining = self._draining or self._mailbox.drain()
        try:
            posted, heartbeats, lost, stale = ray.get(self._draining, timeout=mailbox.ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            return []  # the next call gets the answer
        except ray.exceptions.RayError as e:
            died = f"the driver's mailbox died ({type(e).__name__}), so the driver can't watch the workers"
            self._decide(orders.FaultFound(TrainingError(died)))
            return []
        self._draining = None
        if lost:
            log.warning("dropped the oldest %d events of the workers, because the driver was too slow for them", lost)
        if stale:
            log.debug("dropped %d heartbeats, orders, or questions of earlier attempts", stale)
        now = time.monotonic()
        self._heartbeats = mailbox.by_other_clock(heartbeats, now)
        for attempt, event in posted:
            if attempt != self._mailbox.attempt:
                self._hand_over(attempt, event)  # the run drops it
        events = [event for attempt, event in posted if attempt == self._mailbox.attempt]
        for event in events:
            if isinstance(event, WorkerFailed):
                self._reported.setdefault(event.rank, event.error)
        return [event for event in events if not isinstance(event, WorkerFailed)]

    def _take(self, event: Event) -> None:
        """Passes an event of this attempt to the run."""
        self._hand_over(self._mailbox.attempt, event)

    def _release(self) -> None:
        """Sends a decision to workers that wait at a pause point: whether these workers continue or stop."""
        if self._paused_at is not None and (stop := self.start.pauses.get(self._paused_at)) is not None:
            self._mailbox.decide(self._paused_at, stop)
            self._paused_at = None

    def _look(self) -> None:
        """Checks whether there is a reason to order the workers to stop, or a reason to end the workers."""
        now = time.monotonic()
        if self.signals.name:
            self._decide(orders.StopAsked(self.signals.name, now))
        if self._watch.fault:
            return
        beating = Counter(p["node"] for p in self._heartbeats.values())
        if self.pool.waiting:
            self._say(self._placing.told())
        if self._watch.phase == "data" and not self._starved:
            self._starved = self._say(self._too_little_to_read(beating))
        if self._watch.phase == "stepped" and self._watch.ordered < PREEMPTED:  # otherwise the workers stop anyway
            if gone := beating.keys() & nodes.draining():
                self._decide(orders.NodesLeaving(len(gone), now))
            elif not self._watch.ordered and now >= self._grow_at and self.job.workers.most < max(self.start.counts):
                self._grow_at = now + GROW_S
                better = choose(self.start.counts, nodes.room_now(self.job, self.pool.held(), self.pool.avoided()))
                if better > self.job.workers.most:
                    self._decide(orders.RoomFound(better))
        self._decide(orders.Clock(now))
        if not self._watch.fault and self._watch.phase not in ("placing", "ended"):
            self._find_stall(now)

    def _decide(self, event: orders.AttemptEvent) -> orders.AttemptAction | None:
        """Applies `orders.decide` to an event, and sends the orders that `decide` returns. Called from two threads."""
        with self._deciding:
            self._watch, action = orders.decide(self._watch, event)
        match action:
            case orders.OrderStop():
                log.warning(action.why)
                self._mailbox.order({"stop": action.code})
            case orders.OrderAbort():
                self._mailbox.order({"abort": True})
                self._streams.end()  # the workers may be waiting for the stream
        return action

    def _too_little_to_read(self, beating: Mapping[str, int]) -> str | None:
        limit = f"waiting {self.job.watchdog.start:g} s (watchdog.start) for a CPU"
        if nodes.starved_now(self.job, beating):
            short = f"workers.cpus: {self.job.workers.cpus:g} per worker, so no node has a CPU left to read the data"
            return f"{short}; {limit}. Lower workers.cpus, or add a node"
        waited = time.monotonic() - self._reading > nodes.SAY_S
        if os.environ.get("RAY_ADDRESS") and waited and (crowd := nodes.crowded_now(self.job)):
            return f"{crowd}; {limit}"
        return None

    def _say(self, text: str | None) -> bool:
        """Reports to the user that the run waits, and why. Returns whether there was a text to report."""
        if text:
            self._take(Waiting(text=text))
        return bool(text)

    def _find_stall(self, now: float) -> None:
        limit = self.job.watchdog.stall if self._watch.phase == "stepped" else self.job.watchdog.start
        if reason := watchdog.stalled(self._heartbeats, self.start.job.workers.most, now, limit, self._since):
            suspects = watchdog.frozen(self._heartbeats, now, limit)  # before the stacks, which take time
            where, stacks = self._keep_stacks()
            who = self._held_up(stacks)
            fault = StalledError(f"{reason} (watchdog: {limit:g} s): {who}. Read the workers' stacks in {where}")
            fault.suspects = suspects
            self._decide(orders.FaultFound(fault))

    def _held_up(self, stacks: dict[int, str]) -> str:
        """Describes the worker that the others wait for, with its node and device, or reports that no worker differs from the
        others."""
        calls = {rank: watchdog.call(stack) for rank, stack in stacks.items()}
        rank, why = watchdog.held_up(self._heartbeats, calls, self.job.workers.most)
        if rank is None:
            return why
        known = rank < len(self._members)
        return f"{Failure.of(rank, self._members[rank], None).place if known else f'worker {rank}'} {why}"

    def _keep_stacks(self) -> tuple[str, dict[int, str]]:
        """Collects the stack traces of every worker's threads and writes them to the run's folder. Returns the file's path, and
        the traces by rank."""
        self._mailbox.order({"dump": True})
        stacks = watchdog.collect(self.job.workers.most, self._drained, self._take)
        place = self.job.run_folder.join(run_folder.STACKS, f"{time.strftime('%Y%m%dT%H%M%S')}.txt")
        place.write(watchdog.text(stacks, self.job.workers.most).encode())
        return str(place), stacks

    def _end_workers(self, thread: threading.Thread) -> None:
        if not self._heartbeats:  # the workers have not begun
            self.pool.close()
            self._streams.end()  # the thread may be opening the stream
            thread.join(END_S)
            self.pool.reopen()
            return
        nodes.kill(list(self._heartbeats.values()))
        thread.join(END_S)
        self._drain()
        if thread.is_alive():
            raise TrainingError(f"Ray didn't report within {END_S:.0f} s that the workers had ended") from self._watch.fault

    # the workers -----------------------------------------------------------------------------------------------------

    def _train(self) -> Ended:
        """Starts the workers and waits until all have ended. Returns their results."""
        self._mailbox.post(Phase(phase="placing"))
        try:
            members, placed = self._places()
            self._members = members
            copies = self.start.memory.plan(self._mailbox.attempt, members, self.start.source)
            parts = self._dealt(members)
        except ray.exceptions.RayError as e:
            raise TrainingError(f"can't connect the workers: {type(e).__name__}: {brief(e)}") from e
        ended = self._gather(
            {
                member.actor.run.remote(place, self._config(part, copies)): member
                for member, place, part in zip(members, placed, parts, strict=True)
            }
        )
        for failure in ended.failures:
            if not survived(failure):
                self.pool.drop(members[failure.rank])
        if ended.summary is None:
            here = ray.get_runtime_context().get_node_id()
            silent = {f.node for f in ended.failures if isinstance(f.error, ray.exceptions.ActorUnavailableError)}
            self.pool.avoid(silent - {here})
        return ended

    def _places(self) -> tuple[list[Member], list[WorkerPlace]]:
        """Takes the workers' processes and assigns their ranks. Replaces processes that were set up to see other GPUs."""
        while True:
            members = self.pool.take(self.job.workers.most, patient=len(self.start.counts) == 1)
            placed = places(members)
            unfit = [member for member, place in zip(members, placed, strict=True) if not self.pool.sees(member, place.gpus)]
            if not unfit:
                return members, placed
            for member in unfit:
                self.pool.drop(member)

    def _gather(self, working: dict[ray.ObjectRef[WorkerSummary], Member]) -> Ended:
        """Waits for all workers, which are given in rank order.

        Once one worker has ended, the other workers also end. Either all workers end at the same step, or the driver orders the
        others to abort. The driver sends this order as soon as a worker reports its error, because that worker may never end.
        SETTLE_S seconds later, the driver ends the workers that are still running.
        """
        ended, ranks, waiting = Ended(), {one: rank for rank, one in enumerate(working)}, list(working)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=min(POLL_S, max(0.0, self._watch.back_by - time.monotonic())))
            for one in done:
                ended.add(ranks[one], working[one], one)
            if done or self._reported:
                self._decide(orders.WorkerEnded(bool(ended.failures or self._reported), time.monotonic()))
            if not done and isinstance(self._decide(orders.Clock(time.monotonic())), orders.EndLate):
                log.warning(
                    "ended %d workers that were still running %.0f s after another worker had ended", len(waiting), SETTLE_S
                )
                ended.failures += [Failure.of(ranks[one], working[one], None) for one in waiting]
                break
        return ended

    def _opened(self) -> NodeStreams:
        job, start = self.job, self.start
        fetch = stream.fetch(start.plan, start.order, start.step, job.last_step, job.data.on_bad_sample == "replace")
        labels = nodes.except_on(self.pool.avoided(), job.data.labels)
        limits = StreamLimits(job.data.memory_limit, sample_bytes(job.data.sequence_length, start.manifests), labels)
        return NodeStreams(fetch, job.replicas, limits)

    def _dealt(self, members: list[Member]) -> list[DataIterator | None]:
        """Returns each worker's part of the stream, in rank order.

        In each group of workers that share samples, only the first worker reads, so the parts of the others are None.
        """
        sharing = self.job.train.parallel.sharing
        others = [None] * (sharing - 1)
        parts = self._streams.parts([member.node for member in members[::sharing]])
        return [one for part in parts for one in (part, *others)]

    def _config(self, part: DataIterator | None, memory: MemoryPlan | None) -> WorkerConfig:
        return {
            "job": self.job.dump(),
            "plan": self.start.plan.dump(),
            "start_step": self.start.step,
            "pauses": self.start.pauses.steps,
            "fence": self.start.fence,
            "mailbox": self._mailbox,
            "run_folder": str(self.job.run_folder),
            "queued_s": self.pool.waited_s,
            "memory": memory,
            "part": part,
        }
