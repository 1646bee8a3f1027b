"""Defines the codes of a stop that the workers agree on, and the pause points at which they wait for a decision."""

from __future__ import annotations

from collections.abc import Iterable

# the highest wins
RUN, RESIZE, PREEMPTED, INTERRUPTED = 0, 1, 2, 3
FAILED = 4  # a save failed on some worker: all hear of its error, and continue without it or raise it
STOPS = {RESIZE: "resize", PREEMPTED: "preempted", INTERRUPTED: "interrupted"}


class PausePoints:
    """Holds a run's pause points and the answers to them; any thread may answer, and the first answer for a step stands.

    The workers evaluate and save at such a step, post the event `Paused`, and wait, doing nothing, until `answer` lets them
    continue (RUN) or ends them (INTERRUPTED). So a trial that a scheduler stops has taken no step beyond.
    """

    def __init__(self, steps: Iterable[int] = ()) -> None:
        self.steps = sorted(steps)
        self._answers: dict[int, int] = {}

    def answer(self, step: int, go_on: bool) -> None:
        self._answers.setdefault(step, RUN if go_on else INTERRUPTED)

    def get(self, step: int) -> int | None:
        return self._answers.get(step)
