"""Runs tasks in a pool of Ray actors, one a GPU, which keep the models that they have loaded from task to task."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray

from heliostat.errors import HeliostatError

log = logging.getLogger(__name__)

PLACE_S = 120.0  # for an actor to have a place, and its process to start


class Pool:
    """Gives each task to the actor that has the fewest; an actor that dies is started again, its tasks are not."""

    def __init__(self, execute: Callable[..., dict[str, Any]], size: int, **options: Any) -> None:
        made: Any = ray.remote(_Worker)
        actor = made.options(max_restarts=-1, max_task_retries=0, **options)
        self.actors: list[Any] = _placed([actor.remote(execute) for _ in range(size)])
        self.under_way: dict[Any, int] = {}

    def remote(self, *arguments: Any, **shared: Any) -> Any:
        """Starts a task; returns its reference."""
        load = Counter(self.under_way.values())
        number = min(range(len(self.actors)), key=lambda i: load[i])
        reference = self.actors[number].run.remote(*arguments, **shared)
        self.under_way[reference] = number
        return reference

    def ended(self, reference: Any) -> None:
        """Takes note that a task has ended."""
        self.under_way.pop(reference, None)

    def end(self) -> None:
        """Ends the actors, and what is under way with them."""
        for actor in self.actors:
            ray.kill(actor)


def _placed(actors: list[Any]) -> list[Any]:
    """Waits until the actors have a place; goes on with fewer where others hold what they need, HeliostatError with none."""
    alive = {actor.alive.remote(): actor for actor in actors}
    ready, late = ray.wait(list(alive), num_returns=len(alive), timeout=PLACE_S)
    for reference in late:
        ray.kill(alive[reference])
    if not ready:
        raise HeliostatError(
            f"none of {len(actors)} actors had a place within {PLACE_S:.0f} s: others hold what they need; wait for them"
        )
    if late:
        log.warning("%d of %d actors have a place, others hold what the rest needs; going on with these", len(ready), len(actors))
    return [alive[reference] for reference in ready]


class _Worker:
    """Runs tasks one after another in a process that stays."""

    def __init__(self, execute: Callable[..., dict[str, Any]]) -> None:
        self.execute = execute

    def alive(self) -> None:
        """Answers that the process is there."""

    def run(self, *arguments: Any, **shared: Any) -> dict[str, Any]:
        return self.execute(*arguments, **shared)
