"""Runs tasks in a pool of Ray actors, typically one per GPU. Actors keep their loaded models from task to task."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from heliostat.cluster import ray_internals
from heliostat.errors import HeliostatError

TaskFunction = Callable[..., Mapping[str, object]]
"""Function that does a task's work and returns its record."""

log = logging.getLogger(__name__)

PLACE_S = 120.0  # seconds for Ray to place an actor and start its process


@dataclass
class _Away:
    """Describes an actor whose process or node died. `since`: the time of its death; `call`: a pending call that the actor
    answers when it is back."""

    since: float
    call: Any


class ActorPool:
    """Gives each task to the actor with the fewest tasks. If an actor dies, Ray restarts the actor, but not the actor's tasks.

    If Ray can't place an actor again within PLACE_S seconds, for example after its node died, the pool removes the actor.
    """

    def __init__(self, execute: Callable[..., list[dict[str, Any]]], size: int, **options: object) -> None:
        actor_class: Any = ray.remote(_Worker)
        actor = actor_class.options(max_restarts=-1, max_task_retries=0, **options)
        self.actors: dict[int, Any] = dict(enumerate(_placed([actor.remote(execute) for _ in range(size)])))
        self.under_way: dict[object, int] = {}
        self.away: dict[int, _Away] = {}

    @property
    def ready(self) -> bool:
        """Checks the lost actors, then returns whether any actor takes tasks. After the check, a lost actor is back, still away,
        or removed."""
        for number, away in list(self.away.items()):
            self._look(number, away)
        return len(self.away) < len(self.actors)

    def remote(self, *arguments: object, **shared: object) -> Any:
        """Starts a task on an actor. Returns the Ray reference to the task's result."""
        load = Counter(self.under_way.values())
        number = min(self.actors, key=lambda i: (i in self.away, load[i]))
        reference = self.actors[number].run.remote(*arguments, **shared)
        self.under_way[reference] = number
        return reference

    def ended(self, reference: object) -> None:
        """Removes a task that has ended."""
        self.under_way.pop(reference, None)

    def lost(self, reference: object) -> None:
        """Removes a task whose actor died, and marks the actor as lost."""
        number = self.under_way.pop(reference, None)
        if number in self.actors and number not in self.away:
            self.away[number] = _Away(time.monotonic(), self.actors[number].alive.remote())

    def end(self) -> None:
        """Kills the actors, and the tasks that they run."""
        for actor in self.actors.values():
            ray.kill(actor)

    def _look(self, number: int, away: _Away) -> None:
        """Checks a lost actor. If the actor answers, restores the actor; otherwise removes it after PLACE_S seconds.

        Raises HeliostatError if the removed actor was the last one.
        """
        if ray.wait([away.call], timeout=0)[0]:
            try:
                ray.get(away.call)
            except RayError:  # it isn't back yet, so calls fail
                away.call = self.actors[number].alive.remote()
            else:
                del self.away[number]
                return
        if time.monotonic() - away.since < PLACE_S:
            return
        if _is_alive(self.actors[number]):  # alive, but busy with a task from before the call
            away.since = time.monotonic()
            return
        ray.kill(self.actors.pop(number))
        del self.away[number]
        if not self.actors:
            raise HeliostatError(
                f"can't restart the last actor within {PLACE_S:.0f} s: the actor's node is gone, or other programs use "
                "its resources. Wait for a node, and run the command again. Finished tasks are kept"
            )
        log.warning("can't restart an actor within %.0f s. Continuing with %d actors", PLACE_S, len(self.actors))


def _is_alive(actor: Any) -> bool:
    """Returns whether Ray has a live process for an actor."""
    return ray_internals.actor_lives(actor)


def _placed(actors: list[Any]) -> list[Any]:
    """Waits up to PLACE_S seconds for Ray to place the actors; returns the placed actors.

    Raises HeliostatError if no actor was placed.
    """
    alive = {actor.alive.remote(): actor for actor in actors}
    ready, late = ray.wait(list(alive), num_returns=len(alive), timeout=PLACE_S)
    for reference in late:
        ray.kill(alive[reference])
    if not ready:
        raise HeliostatError(
            f"none of {len(actors)} actors could start within {PLACE_S:.0f} s: other programs use the "
            "resources. Wait until these programs end, and run the command again"
        )
    if late:
        log.warning(
            "started %d of %d actors, because other programs use the remaining resources. Continuing with the started actors",
            len(ready),
            len(actors),
        )
    return [alive[reference] for reference in ready]


class _Worker:
    """Runs tasks one after another in an actor's process."""

    def __init__(self, execute: Callable[..., list[dict[str, Any]]]) -> None:
        self.execute = execute

    def alive(self) -> None:
        """Does nothing: an answer to the call shows that the process is alive."""

    def run(self, *arguments: object, **shared: object) -> list[dict[str, Any]]:
        return self.execute(*arguments, **shared)
