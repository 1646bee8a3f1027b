"""Decides which orders the driver sends to the workers of an attempt, and when the driver ends the workers.

`decide(watch, event)` is a pure function; `attempt` carries out its actions. docs/reliability/driver-states.md has the table. All
times are seconds of the driver's monotonic clock. Each wait for the workers has a deadline:

- `checkpoint.grace` after an order to stop
- some seconds after one worker has failed or ended
- the watchdog's limit otherwise
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from heliostat.errors import HeliostatError, StalledError, StoppedError
from heliostat.training.stops import INTERRUPTED, PREEMPTED, RESIZE, RUN

STEPPING = ("step", "stepped")  # phases in which workers can stop after a checkpoint: during the first step, and after it


@dataclass(frozen=True)
class WorkerWatch:
    """Holds the facts that decide about an attempt's workers.

    - `grace`: seconds for the workers to stop
    - `settle`: seconds for the other workers to end once one has ended
    - `hear`: seconds until all workers have received an order
    - `phase`: the workers' current phase (`runs.events.Phase`)
    - `ordered`: the highest stop code that was ordered
    - `asked_by`: the signal or limit that stops the workers
    - `stop_by`, `back_by`: when the workers must have stopped, and when they must have ended
    - `aborted`: whether the workers were ordered to abort
    - `fault`: the first reason why the driver ends the workers as failed
    """

    grace: float
    settle: float
    hear: float
    phase: str = "placing"
    ordered: int = RUN
    asked_by: str = ""
    stop_by: float = math.inf
    back_by: float = math.inf
    aborted: bool = False
    fault: HeliostatError | None = None


# events --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseBegun:
    """Reports that the workers have begun a phase."""

    phase: str


@dataclass(frozen=True)
class StopAsked:
    """Reports that a signal or a limit asks the run to stop. `by`: its name."""

    by: str
    now: float


@dataclass(frozen=True)
class NodesLeaving:
    """Reports that nodes of the workers are about to leave. `count`: the number of nodes."""

    count: int
    now: float


@dataclass(frozen=True)
class RoomFound:
    """Reports that there is room for more workers."""

    workers: int


@dataclass(frozen=True)
class WorkerEnded:
    """Reports that a worker has ended, or has `failed`.

    A worker that has reported an error counts as failed at once, because it may never end.
    """

    failed: bool
    now: float


@dataclass(frozen=True)
class Clock:
    """Reports the current time, so that `decide` notices deadlines."""

    now: float


@dataclass(frozen=True)
class FaultFound:
    """Reports a reason to end the workers as failed, such as a stall, a lost lease, or a mailbox that died."""

    error: HeliostatError


AttemptEvent = PhaseBegun | StopAsked | NodesLeaving | RoomFound | WorkerEnded | Clock | FaultFound


# actions -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrderStop:
    """Orders the workers to stop after a checkpoint. `why`: the text of the log line."""

    code: int
    why: str


@dataclass(frozen=True)
class OrderAbort:
    """Orders the other workers to abort."""


@dataclass(frozen=True)
class EndLate:
    """Ends the workers that haven't returned in time."""


@dataclass(frozen=True)
class GiveUp:
    """Ends all workers, and raises the error as the attempt's failure."""

    error: HeliostatError


AttemptAction = OrderStop | OrderAbort | EndLate | GiveUp
Decision = tuple[WorkerWatch, AttemptAction | None]


def decide(watch: WorkerWatch, event: AttemptEvent) -> Decision:
    """Computes the new watch, and the driver's action, if any, after an event. It is a pure function."""
    match event:
        case _ if watch.fault and not isinstance(event, WorkerEnded | Clock):
            return watch, None  # the first reason counts
        case PhaseBegun(phase=phase):
            return replace(watch, phase=phase), None
        case StopAsked(by=by) if watch.ordered < INTERRUPTED and watch.phase in STEPPING:
            why = f"{by}: stopping after a checkpoint" + (". Repeat the signal to stop at once" if by.startswith("SIG") else "")
            return _order(replace(watch, asked_by=by), INTERRUPTED, why, event.now + watch.grace)
        case StopAsked(by=by) if watch.ordered < INTERRUPTED and watch.phase != "ended":
            return _give_up(watch, StoppedError(f"stopped by {by} before the first step. No progress was lost"))
        case NodesLeaving(count=count) if watch.ordered < PREEMPTED and watch.phase == "stepped":
            why = f"{count} of the run's nodes are about to leave the cluster: stopping after a checkpoint"
            return _order(watch, PREEMPTED, why, event.now + watch.grace)
        case RoomFound(workers=workers) if watch.ordered < RESIZE and watch.phase == "stepped":
            why = f"the cluster has room for {workers} workers in total: changing to this number after the next checkpoint"
            return _order(watch, RESIZE, why, watch.stop_by)  # the checkpoint is due anyway
        case WorkerEnded(failed=failed, now=now):
            back_by = now + watch.settle if watch.back_by == math.inf else watch.back_by
            if failed and not watch.aborted:
                return replace(watch, back_by=back_by + watch.hear, aborted=True), OrderAbort()
            return replace(watch, back_by=back_by), None
        case Clock(now=now) if now >= watch.back_by:
            return watch, EndLate()
        case Clock(now=now) if now > watch.stop_by and not watch.fault:
            what = f"the workers wrote no checkpoint within checkpoint.grace ({watch.grace:g} s). Raise checkpoint.grace"
            interrupted = watch.ordered == INTERRUPTED
            return _give_up(watch, StoppedError(f"stopped by {watch.asked_by}: {what}") if interrupted else StalledError(what))
        case FaultFound(error=error):
            return _give_up(watch, error)
    return watch, None


def _order(watch: WorkerWatch, code: int, why: str, stop_by: float) -> Decision:
    return replace(watch, ordered=code, stop_by=stop_by), OrderStop(code, why)


def _give_up(watch: WorkerWatch, error: HeliostatError) -> Decision:
    return replace(watch, fault=error), GiveUp(error)
