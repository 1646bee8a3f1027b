"""Explains why an attempt's workers failed, and decides which of the workers' processes the next attempt can use.

The cause is the first error that no other error explains. A broken device has priority over all others. Three kinds of error are
the cause only if there is no other: the loss of a peer, an error after the order to abort, and a worker that didn't end by
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import ray

from heliostat.errors import DeviceError, HeliostatError, PeerLostError, TrainingError, WorkerError, innermost
from heliostat.training import faults

if TYPE_CHECKING:
    from heliostat.training.driver.pool import Member
    from heliostat.training.worker.build import WorkerSummary

Kind = Literal["device", "known", "raised", "unclear", "died", "peer", "late"]
LIKELY: dict[Kind, int] = {"device": 0, "known": 1, "raised": 2, "unclear": 2, "died": 2, "peer": 3, "late": 4}
FAILED = "the workers failed: "
EXPLAINED = ("node has died", "node was terminated", "outofmemory", "out of memory")  # signs that a device isn't the cause


@dataclass(frozen=True)
class Failure:
    """Describes how a worker failed, and where it ran.

    `error`: the error that Ray raised, or None if the worker didn't end by itself. `reported`: the error that the worker reported
    before it cleaned up. That report arrives even if the worker then dies or hangs.
    """

    rank: int
    node: str
    address: str
    gpus: tuple[str, ...]
    error: Exception | None
    reported: HeliostatError | None = None

    @classmethod
    def of(cls, rank: int, member: Member, error: Exception | None) -> Failure:
        return cls(rank, member.node, member.address, member.gpus, error)

    @property
    def place(self) -> str:
        gpus = f", GPU {','.join(self.gpus)}" if self.gpus else ""
        return f"worker {self.rank} on {self.address} (node {self.node[:12]}{gpus})"

    @property
    def own(self) -> BaseException | None:
        """Returns the error that the worker itself raised; None if this error isn't known."""
        if not _alive(self.error):
            return self.reported
        return innermost(self.error) or getattr(self.error, "cause", None) or self.error

    @property
    def culprit(self) -> int:
        """Returns the rank that caused this error. Workers that agree on an error all raise the error of one of them."""
        rank = self.own.rank if isinstance(self.own, WorkerError) else None
        return self.rank if rank is None else rank

    @property
    def kind(self) -> Kind:
        own = self.own
        if own is None:
            return "late" if self.error is None else "died"
        if isinstance(own, PeerLostError):
            return "late"
        if isinstance(own, HeliostatError) and not isinstance(own, WorkerError):
            return "known"
        if isinstance(own, ray.exceptions.RayActorError):  # from the data stream, which ends with the first failure
            return "peer"
        fault = faults.classify(faults.describe(own))
        return fault if fault != "other" else "known" if isinstance(own, WorkerError) else "raised"

    @property
    def text(self) -> str:
        if isinstance(self.own, HeliostatError):
            return faults.message(self.own).removeprefix(FAILED)
        if self.own is not None:
            return faults.describe(self.own)
        return "didn't end after another worker had ended" if self.error is None else _death(self.error)


@dataclass
class Ended:
    """Holds the results of an attempt's workers: rank 0's summary if it finished, and the failures in order of arrival."""

    summary: WorkerSummary | None = None
    failures: list[Failure] = field(default_factory=list)

    def add(self, rank: int, member: Member, result: ray.ObjectRef[WorkerSummary]) -> None:
        """Adds the result of a worker that has ended."""
        try:
            summary = ray.get(result)
        except Exception as e:  # noqa: BLE001 (explained once all have ended)
            self.failures.append(Failure.of(rank, member, e))
        else:
            self.summary = summary if rank == 0 else self.summary


def explain(failures: Sequence[Failure]) -> HeliostatError:
    """Combines the workers' failures, in order of arrival, into one error with a message of one line.

    Ray's error is chained to this error.
    """
    cause = min(failures, key=lambda f: LIKELY[f.kind])
    same_kind = [f for f in failures if f.kind == cause.kind]
    lost = [f for f in failures if f.kind == "died" or (f.kind == "late" and f.own is None)]
    fault: HeliostatError
    match cause.kind:
        case "known" if isinstance(cause.own, HeliostatError):
            fault = cause.own
            fault.args = (str(fault).partition("\nFailed to apply UDF")[0], *fault.args[1:])  # Ray Data adds the rest
            return fault
        case "device":
            fault = _suspecting(DeviceError(f"{_at_fault(cause, failures).place}: {cause.text}"), same_kind, failures)
        case "unclear" if len({f.culprit for f in same_kind}) > 1:  # several devices failed at once, so the program is at fault
            fault = WorkerError(f"{FAILED}{cause.text}")
        case "raised" if not any(f.kind == "died" for f in failures):
            fault = WorkerError(f"{FAILED}{cause.text}")
        case "raised":
            fault = TrainingError(f"{FAILED}{cause.text}; {_named(lost)}")
        case "peer" if lost:
            fault = _suspecting(TrainingError(f"{FAILED}{cause.text}; {_named(lost)}"), lost, failures)
        case "late" if lost:
            fault = _suspecting(TrainingError(f"{FAILED}{_named(lost)}"), lost, failures)
        case "peer" | "late":
            fault = TrainingError(f"{FAILED}{cause.text}")
        case _:
            fault = TrainingError(f"{FAILED}{_at_fault(cause, failures).place}: {cause.text}")
            if not any(word in f"{type(cause.error).__name__} {cause.error}".lower() for word in EXPLAINED):
                fault = _suspecting(fault, same_kind, failures)
    fault.__cause__ = cause.error
    return fault


def survived(failure: Failure) -> bool:
    """Returns whether a worker's process can be used again: the process is alive, and its error is one of heliostat's errors or
    the loss of a peer."""
    if not _alive(failure.error) or failure.kind in ("device", "unclear"):
        return False
    return isinstance(failure.own, HeliostatError) or failure.kind == "peer"


def _suspecting(fault: TrainingError, culprits: Sequence[Failure], failures: Sequence[Failure]) -> TrainingError:
    """Adds the node that may be the cause to the error. If several nodes have the fault at once, no node is suspected."""
    nodes = {_at_fault(f, failures).node for f in culprits}
    fault.suspects = tuple(nodes) if len(nodes) == 1 else ()
    return fault


def _at_fault(failure: Failure, failures: Sequence[Failure]) -> Failure:
    return next((f for f in failures if f.rank == failure.culprit), failure)


def _named(lost: Sequence[Failure]) -> str:
    more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"{lost[0].place}: {lost[0].text}{more}"


def _alive(error: Exception | None) -> bool:
    """Returns whether the process survived.

    The process survived if its own task raised the error. The process is dead if Ray raised the error to report its death.
    """
    return isinstance(error, ray.exceptions.RayTaskError)


def _death(error: Exception) -> str:
    """Shortens Ray's message about a dead process to its last line, without the list of possible causes."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    said = lines[-1].partition(" Some common causes include:")[0].strip() if lines else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
