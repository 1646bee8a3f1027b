"""Sends a worker's heartbeat: a thread reports the worker's progress to the mailbox, and follows the driver's orders.

The loop only counts (`heartbeat.progress += 1`) and asks (`heartbeat.stop`). All workers stop at the same step. For this, each
worker contributes at every step the highest stop code that it knows. `StopConsensus` gives all workers the highest of these
codes, while the step's work runs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import Future

import ray
import torch.distributed as dist

from heliostat.checkpoint import agreement
from heliostat.checkpoint.agreement import Channel
from heliostat.data import device_threads
from heliostat.engine import process_group
from heliostat.runs.events import Stack
from heliostat.runs.profile import ProfileRequest
from heliostat.training.mailbox import AttemptMailbox, Facts, Orders, interval
from heliostat.training.stops import PREEMPTED, RUN
from heliostat.training.worker import sigterm

log = logging.getLogger(__name__)

EVERY_S = 1.0
ANSWER_S = 30.0
VOTES = 2  # tag of the channel for stop codes


class Heartbeat:
    def __init__(self, mailbox: AttemptMailbox, rank: int, workers: int) -> None:
        self.progress = 0  # grows whenever the loop makes progress
        self.step = self.micro = 0  # the current step, from 1, and its micro-batches so far
        self.profiles = deque[ProfileRequest]()  # requests for this worker, oldest first
        self._mailbox, self._rank, self._ordered = mailbox, rank, RUN
        self._every = interval(workers)
        self._abort = process_group.order()
        self._node = ray.get_runtime_context().get_node_id()
        self._ended = threading.Event()
        self._thread = device_threads.thread(self._beat, "heartbeat")

    @property
    def stop(self) -> int:
        """Returns the highest stop code that this worker knows."""
        return max(self._ordered, PREEMPTED if sigterm.received.is_set() else RUN)

    def end(self) -> None:
        self._ended.set()

    def _beat(self) -> None:
        dumped = aborted = False
        profile = ""  # id of the last profile request
        while True:
            facts: Facts = {"pid": os.getpid(), "node": self._node, "step": self.step, "micro": self.micro}
            orders: Orders = {}
            try:
                orders = ray.get(self._mailbox.heartbeat(self._rank, self.progress, facts), timeout=ANSWER_S)
            except ray.exceptions.RayError as e:  # without a mailbox there is no driver, and Ray ends this process
                log.warning("worker %d: no answer from the driver's mailbox (%s)", self._rank, type(e).__name__)
            self._ordered = max(self._ordered, orders.get("stop", RUN))
            if orders.get("dump") and not dumped:
                dumped = True
                self._mailbox.post(Stack(rank=self._rank, stack=stacks()))
            if (request := orders.get("profile")) and request.rank == self._rank and request.id != profile:
                profile = request.id
                self.profiles.append(request)
            if orders.get("abort") and not aborted:
                aborted = True
                process_group.obey(self._abort)  # here, because the main thread may be in a collective that does not end
            if self._ended.wait(self._every):
                return


def stacks() -> str:
    """Formats the stack trace of every thread of this process."""
    names = {t.ident: t.name for t in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


class StopConsensus:
    """Finds the highest stop code of all workers. Call `ask(code)` before a step's work, and `result()` after it.

    A thread passes the codes along a tree during the step's work, on a separate channel of the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._channel = Channel(group, VOTES)
        self._thread = device_threads.pool(1, "stop-consensus")
        self._vote: Future[int]

    def ask(self, code: int) -> None:
        self._vote = self._thread.submit(lambda: agreement.down(self._channel, agreement.up(self._channel, code, max)))

    def result(self) -> int:
        """Waits for the consensus and returns the highest code that any worker has asked for."""
        return self._vote.result()
