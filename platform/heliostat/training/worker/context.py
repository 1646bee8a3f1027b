"""Describes the state that all parts of a worker share: its position in an attempt, its reports, and the hooks around its steps.

    posts.tell(Evaluation(...))     # must not be lost: kept until a checkpoint holds it, too
    posts.notice("...")             # a line at the terminal

No post waits for the driver: an event is sent, and lost if there is no driver.

Evaluation, checkpoints, and checks are each a `Hook` that the loop (`step`) calls. To add a hook, derive a class from `Hook`,
override the methods it needs, and list it in `build`. A hook must not wait for the device or for another worker at every step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch.distributed as dist

from heliostat.config.spec import Job
from heliostat.data.dataset import DataPlan
from heliostat.engine import process_group
from heliostat.errors import HeliostatError
from heliostat.runs.events import Evaluation, Event, LossSpike, Notice, Phase, Steps
from heliostat.runs.time_ledger import Ledger
from heliostat.storage import wire
from heliostat.storage.lease import Fence
from heliostat.storage.locations import Location
from heliostat.training.mailbox import AttemptMailbox

log = logging.getLogger(__name__)

Kept = Steps | LossSpike | Evaluation  # events that in-memory checkpoints contain, too
for kind in (Steps, LossSpike, Evaluation):
    wire.travels(kind)


class Posts:
    """Posts rank 0's events, which are the same on all workers.

    `mailbox`: the driver's mailbox; None without a driver. `unsaved`: events since the last checkpoint, which must survive the
    driver's death. `dropped`: the number of events after the order to abort, which weren't posted.
    """

    def __init__(self, mailbox: AttemptMailbox | None, rank: int) -> None:
        self.mailbox, self.rank = mailbox, rank
        self.unsaved: list[Kept] = []
        self.dropped = 0

    def post(self, event: Event) -> None:
        if self.rank == 0:
            self.post_of_any(event)

    def tell(self, event: Kept) -> None:
        """Posts an event that must not be lost: the worker keeps the event until a checkpoint contains it."""
        self.unsaved.append(event)
        self.post(event)

    def notice(self, text: str | None) -> None:
        """Posts a notice for the user at the terminal, if `text` isn't empty."""
        if text:
            self.post(Notice(text=text))

    def notice_of_any(self, text: str) -> None:
        """Posts a notice of this worker, on any rank."""
        self.post_of_any(Notice(text=text))

    def post_of_any(self, event: Event) -> None:
        """Posts an event of this worker, on any rank. Drops the event after the order to abort."""
        if process_group.ordered():
            self.dropped += 1
            log.debug("dropped %s of an attempt that was aborted", type(event).__name__)
        elif self.mailbox is not None:
            self.mailbox.post(event)


@dataclass
class Latest:
    """Holds the latest results, for checkpoints and the summary: the last reported loss, the held-out scores, and the step at
    which the scores were computed.
    """

    loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    scored_at: int = -1


@dataclass(frozen=True)
class Context:
    """Holds the attempt's job, data, and first step, and this worker's position in it.

    `control`: a gloo group of all workers. `fence`: the fence of the driver's lease. `progressed`: reports progress to the
    watchdog; raises PeerLostError once the workers are ordered to abort.
    """

    job: Job
    plan: DataPlan
    run_folder: Location
    start_step: int
    rank: int
    world: int
    control: dist.ProcessGroup
    fence: Fence
    posts: Posts
    progressed: Callable[[], None]
    ledger: Ledger
    latest: Latest = field(default_factory=Latest)

    def phase(self, name: str) -> None:
        """Posts that the workers begin a phase (`runs.events.Phase`)."""
        self.posts.post(Phase(phase=name, ledger=self.ledger.totals()))


class Due(NamedTuple):
    """Describes the work that is due after a step. This work is the same on every worker.

    - `last`: the step is the run's last
    - `reports`: the step's results are posted
    - `evaluates`: the model is scored
    - `saves`: the state is saved to storage
    - `keeps`: the state is copied into memory
    - `holds`: the workers then wait for a decision
    """

    last: bool
    reports: bool
    evaluates: bool
    saves: bool
    keeps: bool
    holds: bool


class Hook:
    """Adds work around the steps. Every worker calls all hooks at the same points, in the same order."""

    copies = False  # whether the hook copies the training state into memory when `Due.keeps` is set

    @property
    def blocked_s(self) -> float:
        """Returns the seconds that training has waited for work in the hook's threads."""
        return 0.0

    @property
    def unsettled(self) -> bool:
        """Returns whether work in the hook's threads has failed on this worker. Then all workers call `settle`."""
        return False

    def settle(self) -> bool:
        """Waits for work in the hook's threads.

        All workers call this method together. Returns whether the work succeeded. Raises a fatal error on all workers.
        """
        return True

    def looks(self, step: int) -> bool:
        """Returns whether `before_step` reads the results of earlier steps.

        If so, the loop first passes the gradient norms of these steps to the hooks.
        """
        return False

    def before_step(self, step: int) -> None:
        """Acts before a step, counted from 0."""

    def on_norm(self, step: int, norm: float) -> None:
        """Acts on a step's gradient norm, once per step. `step` counts from 0.

        The call comes after the next step. The call comes earlier if a report, comparison, evaluation, or save that depends on
        the step is due.
        """

    def cause(self, norms: list[tuple[int, float]]) -> HeliostatError | None:
        """Returns the error of an earlier step that explains the current step's error, if the norms show such an error.

        `norms`: pairs of a step, counted from 0, and its norm. This method must not wait for other workers, because the other
        workers may not have failed.
        """
        return None

    def after_step(self, done: int, due: Due) -> None:
        """Runs after each step, before the step is reported. `done`: the number of completed steps."""

    def on_report(self, first: int, losses: list[float]) -> None:
        """Acts on the losses of steps `first`, `first` + 1, ..., counted from 0, before they are posted."""

    def on_save(self, done: int, due: Due) -> None:
        """Acts after `done` steps are completed and reported.

        Use this method for work that reads or saves the weights. The time of this work doesn't count as time of the steps.
        """
