"""Describes what all parts of a worker share: where it stands in an attempt, how it reports, and the hooks around its steps.

    posts.tell(Evaluation(...))     # not to be lost: kept until a checkpoint holds it, too
    posts.notice("...")             # a line at the terminal

Nothing waits for the driver: an event is sent, and lost without one. Evaluation, checkpoints, and checks are each a `Hook` that
the loop (`step`) calls. To add one, derive a class from `Hook`, override what it needs, and list it in `build`. Nothing in a hook
may wait for the device or for another worker at every step.
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

Kept = Steps | LossSpike | Evaluation  # that copies in memory hold
for kind in (Steps, LossSpike, Evaluation):
    wire.travels(kind)


class Posts:
    """Posts rank 0's events, which are the same on all workers.

    `mailbox`: the driver's; None without a driver. `unsaved`: events since the last checkpoint that must not be lost, even if the
    driver dies before it has them. `dropped`: how many events came after the order to abort, and were not posted.
    """

    def __init__(self, mailbox: AttemptMailbox | None, rank: int) -> None:
        self.mailbox, self.rank = mailbox, rank
        self.unsaved: list[Kept] = []
        self.dropped = 0

    def post(self, event: Event) -> None:
        if self.rank == 0:
            self.post_of_any(event)

    def tell(self, event: Kept) -> None:
        """Posts an event that must not be lost."""
        self.unsaved.append(event)
        self.post(event)

    def notice(self, text: str | None) -> None:
        """Posts a notice for the user at the terminal, if there is one."""
        if text:
            self.post(Notice(text=text))

    def notice_of_any(self, text: str) -> None:
        """Posts a notice that is not rank 0's alone."""
        self.post_of_any(Notice(text=text))

    def post_of_any(self, event: Event) -> None:
        """Posts an event that is not rank 0's alone; after the order to abort it is dropped."""
        if process_group.ordered():
            self.dropped += 1
            log.debug("dropped %s of an attempt that was aborted", type(event).__name__)
        elif self.mailbox is not None:
            self.mailbox.post(event)


@dataclass
class Latest:
    """Holds what the last steps gave, for checkpoints and the summary: the loss last reported; the held-out scores, and the step
    that they are of."""

    loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    scored_at: int = -1


@dataclass(frozen=True)
class Context:
    """Holds the attempt's job, data and first step, and this worker's place in it.

    `control`: a gloo group of all workers; `fence`: of the driver's lease; `progressed`: reports progress to the watchdog,
    and raises PeerLostError once the workers were ordered to abort.
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
    """Describes what follows a step; the same on every worker.

    `last`: it is the run's last one; `reports`: its numbers are posted; `evaluates`, `saves`, `keeps`: the model is scored, saved
    in storage, and copied into memory; `holds`: the workers then wait for a decision.
    """

    last: bool
    reports: bool
    evaluates: bool
    saves: bool
    keeps: bool
    holds: bool


class Hook:
    """Does something around the steps; every worker calls all hooks at the same points, in the same order."""

    copies = False  # whether it copies the training state into memory, where that is due

    @property
    def blocked_s(self) -> float:
        """Returns the seconds for which work in its threads has kept training waiting."""
        return 0.0

    @property
    def unsettled(self) -> bool:
        """Tells whether work in its threads has failed on this worker: then all workers call `settle`."""
        return False

    def settle(self) -> bool:
        """Waits for work in its threads; collective. Returns whether it succeeded; raises on all workers what ends them."""
        return True

    def looks(self, step: int) -> bool:
        """Tells whether `before_step` looks at what the steps before have made: their norms are judged first."""
        return False

    def before_step(self, step: int) -> None:
        """Acts before a step, counted from 0."""

    def on_norm(self, step: int, norm: float) -> None:
        """Acts on the norm of a step's gradient, once for each step, counted from 0: after the next step, or sooner, before
        anything is reported, compared, evaluated, or saved that depends on the step."""

    def cause(self, norms: list[tuple[int, float]]) -> HeliostatError | None:
        """Returns the error of an earlier step that made the present one raise its own, if the norms of steps before show it:
        pairs of a step, counted from 0, and its norm. Waits for no other worker, because others may not have failed."""
        return None

    def after_step(self, done: int, due: Due) -> None:
        """Acts once `done` steps are made, before the last of them is reported."""

    def on_report(self, first: int, losses: list[float]) -> None:
        """Acts on the losses of steps `first`, `first` + 1, ..., counted from 0, before they are posted."""

    def on_save(self, done: int, due: Due) -> None:
        """Acts once `done` steps are made and reported, for what reads or keeps the weights. The steps' clock stops."""
