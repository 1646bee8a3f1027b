"""Profiles some steps of one worker of a running job. Defines the request and its answer, which are files in the run's folder.

`heliostat debug profile` writes `profiles/request.json`. The driver (`training.driver.profiles`) orders the worker to profile its
next steps. The worker (`training.worker.profiler`) writes the profile's files to `profiles/ID/`, and after these `answer.json`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from heliostat.errors import ConfigError, HeliostatError
from heliostat.runs import liveness
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Inside, Whole, closed, open_

STEPS = 100  # maximum number of steps: a trace has thousands of events per step
ANSWER = "answer.json"
TRACE, MEMORY = ".trace.json.gz", ".memory.pickle"  # endings of file names
DRIVER = "driver.stacks.txt"  # file with the stacks of the driver's threads, if py-spy could read them
POLL_S, LOOK_S = 0.5, 5.0  # seconds between two checks for the answer, and between two checks of the driver


@closed
@dataclass(frozen=True)
class ProfileRequest:
    """Requests a profile of the next `steps` steps of worker `rank`. `id` is also the name of the profile's folder."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8,40}$")]
    rank: Whole
    steps: Annotated[int, Field(ge=1, le=STEPS)]


@open_
class ProfileAnswer(TypedDict):
    """Describes a profile of `steps` steps. `first`: the number of the first profiled step, counted from 1. `files`: names of the
    files in the profile's folder.

    `problem`: the reason why there is no profile; empty if there is a profile.
    """

    problem: str
    first: Whole
    steps: Whole
    files: list[Inside]


REQUEST = Format(ProfileRequest, "request for a profile")
ANSWERED = Format(ProfileAnswer, "answer to a request for a profile")


def place(run: Location, request: ProfileRequest) -> Location:
    """Returns the folder of a profile."""
    return run.join(run_folder.PROFILES, request.id)


def requested(run: Location) -> ProfileRequest | None:
    """Reads the run's request for a profile; None if there is no request, or if the request already has an answer. Raises
    DataError if the file isn't a request."""
    try:
        request = REQUEST.read(_request(run))
    except FileNotFoundError:
        return None
    return None if answered(run, request) else request


def discard(run: Location) -> None:
    """Deletes the run's request for a profile."""
    _request(run).delete()


def answer(
    run: Location, request: ProfileRequest, first: int = 0, steps: int = 0, files: Sequence[str] = (), problem: str = ""
) -> None:
    """Writes the answer to a request, after the profile's files are complete. `first`: the number of the first step, counted
    from 1."""
    content: ProfileAnswer = {"problem": problem, "first": first, "steps": steps, "files": list(files)}
    place(run, request).join(ANSWER).write(json.dumps(content).encode())


def answered(run: Location, request: ProfileRequest) -> ProfileAnswer | None:
    """Reads the answer to a request; None if there is no answer yet."""
    try:
        return ANSWERED.read(place(run, request).join(ANSWER))
    except FileNotFoundError:
        return None


def take(
    run: Location, rank: int, steps: int, sleep: Callable[[float], object] = time.sleep
) -> tuple[ProfileRequest, ProfileAnswer]:
    """Requests a profile and waits until the profile is complete. Returns the request and its answer.

    Raises ConfigError if the run isn't running, has no such worker, or is already being profiled. Raises HeliostatError if the
    run ends without an answer, or if the worker couldn't profile its steps.
    """
    workers = _workers(run)
    if workers is None:
        if liveness.last(run) is None:
            raise ConfigError(
                f"{run}: no run in this folder. If the run is on another machine, pass a folder that both machines can read"
            )
        raise ConfigError(f"{run}: the run isn't running. Start the run, then profile again: heliostat train JOB --resume")
    if rank >= workers:
        raise ConfigError(f"--rank: the run has {workers} workers, and none has rank {rank}. Pass a rank from 0 to {workers - 1}")
    request = ProfileRequest(time.strftime("%Y%m%d%H%M%S", time.gmtime()) + secrets.token_hex(3), rank, steps)
    _send(run, request)
    try:
        look_at = time.monotonic() + LOOK_S
        while (result := answered(run, request)) is None:
            if time.monotonic() >= look_at:
                if _workers(run) is None and answered(run, request) is None:
                    raise HeliostatError(
                        f"{run}: the run ended before worker {rank} was profiled. Resume the run, and profile again"
                    )
                look_at = time.monotonic() + LOOK_S
            sleep(POLL_S)
    finally:
        discard(run)
    if result["problem"]:
        raise HeliostatError(f"{run}: worker {rank} wasn't profiled ({result['problem']})")
    return request, result


def _send(run: Location, request: ProfileRequest) -> None:
    """Writes the request. Raises ConfigError if an earlier request has no answer yet."""
    data = json.dumps(asdict(request)).encode()
    if _request(run).create(data):
        return
    other = requested(run)
    if other is None:  # a killed command left the request, or another command has just deleted the request
        discard(run)
        if _request(run).create(data):
            return
        other = requested(run)
    if other != request:  # if they are equal, the store's reply to this write was lost
        raise ConfigError(
            f"{run}: another profile isn't complete yet. Wait until that profile is complete. "
            f"If the command for that profile was killed, delete {_request(run)}"
        )


def _request(run: Location) -> Location:
    return run.join(run_folder.PROFILES, "request.json")


def _workers(run: Location) -> int | None:
    """Counts the workers of a run; None if the run isn't running."""
    attempt = liveness.last(run)
    return attempt.workers if attempt and attempt.outcome is None and liveness.lives(attempt) else None
