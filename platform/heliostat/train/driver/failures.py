"""Explains why an attempt's workers have failed, and tells which of their processes can go on with the next."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from heliostat.errors import HeliostatError, TrainingError, WorkerError, innermost

PEER_LOST = ("connection closed by peer", "connection reset", "gloo", "nccl", "timed out", "broken pipe", "socket")


def explain(failures: Sequence[Exception]) -> HeliostatError:
    """Explains the workers' errors in one line: by a HeliostatError of theirs if there is one, else by Ray's, chained."""
    for error in failures:
        if known := innermost(error):
            known.args = (str(known).partition("\nFailed to apply UDF")[0], *known.args[1:])  # Ray Data's addition
            return known
    dead = [e for e in failures if not _alive(e)]
    first = next(iter([*dead, *(e for e in failures if not _lost_peer(e)), *failures]))
    cause = getattr(first, "cause", None) or first
    text = [line for line in str(cause).splitlines() if line.strip()]
    kind = WorkerError if not dead and not all(map(_lost_peer, failures)) else TrainingError
    fault = kind(f"the workers failed: {type(cause).__name__}{f': {_short(text[-1])}' if text else ''}")
    fault.__cause__ = first
    return fault


def survived(error: Exception) -> bool:
    """Tells whether a worker's process can be used again: it lives, and its error is one of ours, or another's loss."""
    if not _alive(error):
        return False
    lost_stream = isinstance(getattr(error, "cause", None), ray.exceptions.RayActorError)
    return innermost(error) is not None or lost_stream or _lost_peer(error)


def _alive(error: Exception) -> bool:
    """Tells whether the process lived on: whether its task has raised the error, and not Ray in its place."""
    return isinstance(error, ray.exceptions.RayTaskError)


def _lost_peer(error: Exception) -> bool:
    """Tells whether an error comes from a collective that another worker, or the network, has dropped out of."""
    return any(word in str(error).lower() for word in PEER_LOST)


def _short(text: str) -> str:
    """Shortens Ray's message about a dead process by leaving out its guesses at the cause."""
    return text.partition(" Some common causes include:")[0].strip()
