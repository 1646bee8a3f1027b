"""Decides what a run's driver does next. `follow(course, event)` is a pure function; `run` carries out its actions.

Every attempt has a number. A message with the number of another attempt, or of an attempt that has ended, is dropped and counted.
Results, errors, and events of such an attempt's workers no longer count. docs/reliability/driver-states.md has the table of
states.

starting -> running -> finalizing -> finished

A running run can become resizing or recovering, until workers complete a step again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from heliostat.errors import CorruptionError, HeliostatError, LimitError, LossSpikeError, StoppedError
from heliostat.training.driver.recovery import Budget, classify
from heliostat.training.stops import INTERRUPTED, RUN, STOPS


class RunState(StrEnum):
    """Lists the states of a run, as its driver sees them. The last three end the command."""

    STARTING = "starting"  # no worker has completed a step yet
    RUNNING = "running"  # workers complete steps
    RECOVERING = "recovering"  # an attempt has failed, and the next one has completed no step yet
    RESIZING = "resizing"  # workers have stopped for a new worker count, or because a node leaves; no step is complete since then
    FINALIZING = "finalizing"  # all steps are done: the model is exported and registered
    FINISHED = "finished"
    STOPPED = "stopped"  # by a signal, a limit, or a sweep; `--resume` continues
    FAILED = "failed"


S = RunState
ENDS = frozenset({S.FINISHED, S.STOPPED, S.FAILED})
BEFORE_STEPS = frozenset({S.STARTING, S.RECOVERING, S.RESIZING})  # the states in which an attempt may begin


@dataclass(frozen=True)
class Course:
    """Holds the facts that decide a run's next action.

    - `budget`: the retries that are used and left
    - `start`: the step from which the current attempt starts, or the next one will
    - `saved`: the step of the newest checkpoint in storage
    - `done`: the last step that workers have reported
    - `attempt`: the number of the newest attempt, from 1
    - `under_way`: whether the newest attempt is still running
    - `trust_memory`: whether in-memory checkpoints may be used
    - `failure`: the error of a failed attempt, until a checkpoint is chosen
    - `restarts`: the number of restarts so far
    - `dropped`: the number of dropped messages and results of other attempts
    """

    budget: Budget
    start: int
    saved: int
    done: int
    state: RunState = S.STARTING
    attempt: int = 0
    under_way: bool = False
    trust_memory: bool = True
    failure: HeliostatError | None = None
    restarts: int = 0
    dropped: int = 0


# events --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    """Reports that the driver begins an attempt."""


@dataclass(frozen=True)
class CopiesFound:
    """Reports intact in-memory checkpoints of `step`: the step of the newest checkpoint in storage, or a later step."""

    attempt: int
    step: int


@dataclass(frozen=True)
class WorkerMessage:
    """Reports a message of a worker. `kind`: the event's class name. `done`: the number of completed steps, if the message
    reports steps."""

    attempt: int
    kind: str
    done: int | None = None


@dataclass(frozen=True)
class Stopped:
    """Reports that all workers have ended after `step`, with the same stop code. `limit`: the job's limit that is reached, if
    any."""

    attempt: int
    stop: int
    step: int
    limit: str = ""


@dataclass(frozen=True)
class Failed:
    """Reports that an attempt has failed. `error`: the cause of the failure. `refused`: whether the store rejects the driver,
    too. `limit`: as in `Stopped`."""

    attempt: int
    error: HeliostatError
    refused: bool = False
    limit: str = ""


@dataclass(frozen=True)
class CheckpointFound:
    """Reports the step of the newest checkpoint that is safe to use after the failure, or 0 if there is none.

    `notes`: the actions on bad nodes.
    """

    step: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """Reports that a signal or a limit stops the run while no workers run. `error`: the error that ends the command."""

    error: StoppedError


@dataclass(frozen=True)
class AllDone:
    """Reports that an earlier command has completed all steps."""


@dataclass(frozen=True)
class CommandEnded:
    """Reports that the command has completed its work, or that an error ends the command. `state`: one of ENDS."""

    state: RunState


RunEvent = Begin | CopiesFound | WorkerMessage | Stopped | Failed | CheckpointFound | Asked | AllDone | CommandEnded


# actions -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartWorkers:
    """Starts workers."""

    attempt: int


@dataclass(frozen=True)
class Take:
    """Passes the message to the ledger, MLflow, and the terminal."""


@dataclass(frozen=True)
class Drop:
    """Drops a message and counts it. `what`: the kind of the message."""

    attempt: int
    what: str


@dataclass(frozen=True)
class ForgetCopies:
    """Deletes the in-memory checkpoints."""


@dataclass(frozen=True)
class FindCheckpoint:
    """Chooses a checkpoint from which to recover."""

    error: HeliostatError


@dataclass(frozen=True)
class Restart:
    """Records a restart in the ledger. `outcome`, `reason`: the outcome of the attempt that has ended, and the reason for this
    outcome."""

    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class GoBack:
    """Returns to the checkpoint.

    `step`: the checkpoint's step. `left_out`: the first and the last step whose samples are skipped, or None.
    """

    step: int
    left_out: tuple[int, int] | None = None


@dataclass(frozen=True)
class Wait:
    """Waits before the next attempt. `why`: the text of the log line."""

    seconds: float
    why: str


@dataclass(frozen=True)
class Raise:
    """Ends the command with the error."""

    error: HeliostatError


Action = StartWorkers | Take | Drop | ForgetCopies | FindCheckpoint | Restart | GoBack | Wait | Raise
Next = tuple[Course, tuple[Action, ...]]


def follow(course: Course, event: RunEvent) -> Next:
    """Computes the new course, and the driver's actions, in order, after an event. It is a pure function.

    Raises RuntimeError for an event that can't happen in this state. An event of another attempt can always happen, and is
    dropped.
    """
    match event:
        case (
            WorkerMessage(attempt=attempt) | Stopped(attempt=attempt) | Failed(attempt=attempt) | CopiesFound(attempt=attempt)
        ) if attempt != course.attempt or not course.under_way:
            what = event.kind if isinstance(event, WorkerMessage) else type(event).__name__
            return replace(course, dropped=course.dropped + 1), (Drop(attempt, what),)
        case CommandEnded() if course.state in ENDS:
            return course, ()  # the first end of the command counts
        case _ if course.state in ENDS:
            pass  # a run that has ended accepts no other events
        case CommandEnded(state=state) if state in ENDS and (
            state is not S.FINISHED or course.state in (S.STARTING, S.FINALIZING)
        ):
            return replace(course, state=state, under_way=False, failure=None), ()
        case Begin() if course.state in BEFORE_STEPS and not course.under_way and course.failure is None:
            following = replace(course, attempt=course.attempt + 1, under_way=True, start=course.saved, done=course.saved)
            return following, (StartWorkers(following.attempt),)
        case CopiesFound(step=step) if course.trust_memory and step >= course.saved and course.state in BEFORE_STEPS:
            return replace(course, start=step, done=step, trust_memory=False), ()  # False until workers have completed a step
        case WorkerMessage(done=None):
            return course, (Take(),)
        case WorkerMessage(done=int(done)):
            return replace(course, state=S.RUNNING, done=done, trust_memory=True), (Take(),)
        case Stopped():
            return _stopped(replace(course, under_way=False), event)
        case Failed():
            return _failed(replace(course, under_way=False), event)
        case CheckpointFound() if course.failure is not None:
            return _again(replace(course, failure=None), course.failure, event)
        case Asked(error=error) if not course.under_way:
            return _raise(course, error)
        case AllDone() if course.state is S.STARTING and not course.attempt:
            return replace(course, state=S.FINALIZING), ()
    raise RuntimeError(f"{type(event).__name__} can't happen while a run is {course.state}: {course}")


def _raise(course: Course, error: HeliostatError) -> Next:
    state = S.STOPPED if isinstance(error, StoppedError) else S.FAILED
    return replace(course, state=state, failure=None), (Raise(error),)


def _stopped(course: Course, event: Stopped) -> Next:
    """Handles the end of workers that were ordered to stop, or that have completed the last step."""
    if event.stop == RUN:
        return replace(course, state=S.FINALIZING, done=event.step), ()
    if event.stop == INTERRUPTED:
        where = f"stopped at step {event.step}, after a checkpoint"
        if event.limit:
            return _raise(course, LimitError(f"{event.limit}; {where}. Raise the limit, and use --resume to continue"))
        return _raise(course, StoppedError(f"{where}. Use --resume to continue"))
    restarts = course.restarts + 1
    resized = replace(course, state=S.RESIZING, start=event.step, saved=event.step, done=event.step, restarts=restarts)
    return resized, (Restart(STOPS[event.stop]),)


def _failed(course: Course, event: Failed) -> Next:
    """Handles a failure: ends the command, waits for resources again, or looks for a checkpoint."""
    error, limit, kind = event.error, event.limit, classify(event.error)
    if isinstance(error, StoppedError):
        return _raise(course, LimitError(str(error) if limit in str(error) else f"{limit}; {error}") if limit else error)
    if kind == "final" or event.refused:
        return _raise(course, error)
    if kind == "queued":  # no worker started, so this uses no retry
        again = replace(course, state=S.RECOVERING, restarts=course.restarts + 1, trust_memory=True)
        return again, (Restart("failed", str(error)), Wait(course.budget.retries.backoff, f"{error}. Trying again"))
    doubted = kind in ("corrupt", "spike") or isinstance(error, CorruptionError)  # the in-memory checkpoints may be bad, too
    looking = replace(course, state=S.RECOVERING, failure=error)
    return looking, ((ForgetCopies(), FindCheckpoint(error)) if doubted else (FindCheckpoint(error),))


def _again(course: Course, error: HeliostatError, event: CheckpointFound) -> Next:
    """Handles the choice of a checkpoint: starts another attempt from it, or ends the run if the retries are used up."""
    step, budget = event.step, replace(course.budget)
    try:
        wait = budget.spend(error, step)
    except HeliostatError as used_up:
        return _raise(course, used_up)
    retry = f"retry {budget.used} of {budget.retries.max}"
    why = f"{error}. Resuming from step {step} in {wait:.0f} s ({retry})"
    left_out = (max(step, error.step - 1), error.step) if isinstance(error, LossSpikeError) else None
    again = replace(course, budget=budget, start=step, saved=step, done=step, restarts=course.restarts + 1)
    return again, (Restart("failed", ". ".join([str(error), *event.notes])), GoBack(step, left_out), Wait(wait, why))
