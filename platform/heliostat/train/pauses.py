"""Where a run waits for a word from outside: behind the checkpoint of certain steps, as a trial of a sweep does.

The workers evaluate and save at such a step, the driver posts that they are there (the event `held`), and they wait, doing
nothing, until `answer` says that they go on (RUN) or end (INTERRUPTED). So what a scheduler stops has not taken a step more.
"""

from __future__ import annotations

from collections.abc import Iterable

from heliostat.train.stop_codes import INTERRUPTED, RUN


class PausePoints:
    """Answers may come from any thread; the first one to a step stands."""

    def __init__(self, steps: Iterable[int] = ()) -> None:
        self.steps = sorted(steps)
        self._answers: dict[int, int] = {}

    def answer(self, step: int, go_on: bool) -> None:
        self._answers.setdefault(step, RUN if go_on else INTERRUPTED)

    def get(self, step: int) -> int | None:
        return self._answers.get(step)
