"""Pauses a run behind the checkpoints of certain steps until a decision comes from outside, as for a trial of a sweep.

The workers evaluate and save at such a step, the driver posts the event `Paused`, and they wait, doing nothing, until `answer`
lets them go on (RUN) or ends them (INTERRUPTED). So a trial that a scheduler stops has taken no step beyond.
"""

from __future__ import annotations

from collections.abc import Iterable

from heliostat.training.stop_codes import INTERRUPTED, RUN


class PausePoints:
    """Holds a run's pause points and the answers to them; any thread may answer, and the first answer for a step stands."""

    def __init__(self, steps: Iterable[int] = ()) -> None:
        self.steps = sorted(steps)
        self._answers: dict[int, int] = {}

    def answer(self, step: int, go_on: bool) -> None:
        self._answers.setdefault(step, RUN if go_on else INTERRUPTED)

    def get(self, step: int) -> int | None:
        return self._answers.get(step)
