"""Defines the stop codes that the workers agree on, and the pause points at which they wait for a decision."""

from __future__ import annotations

from collections.abc import Iterable

# the highest code wins
RUN, RESIZE, PREEMPTED, INTERRUPTED = 0, 1, 2, 3
FAILED = 4  # a save failed on some worker: all workers get its error, and either continue without the checkpoint or raise it
STOPS = {RESIZE: "resize", PREEMPTED: "preempted", INTERRUPTED: "interrupted"}


class PausePoints:
    """Holds a run's pause points and the decisions about them. Any thread may answer; the first answer for a step counts.

    At a pause point the workers evaluate, save, post the event `Paused`, and wait idle. `answer` makes the workers continue (RUN)
    or stop (INTERRUPTED). So a trial that a scheduler stops has trained no step beyond its pause point.
    """

    def __init__(self, steps: Iterable[int] = ()) -> None:
        self.steps = sorted(steps)
        self._answers: dict[int, int] = {}

    def answer(self, step: int, go_on: bool) -> None:
        self._answers.setdefault(step, RUN if go_on else INTERRUPTED)

    def get(self, step: int) -> int | None:
        return self._answers.get(step)
