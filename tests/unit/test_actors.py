"""Tests a pool's actors whose process or node died: which tasks wait for them, and how long."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from heliostat.errors import HeliostatError
from heliostat.tasks import pool
from heliostat.tasks.pool import ActorPool
from ray.exceptions import ActorUnavailableError


class Fake:
    """Replaces Ray: actors without a place once they are `gone`, and calls that never get an answer."""

    def __init__(self, number: int) -> None:
        self.number, self.gone, self.killed, self.calls = number, False, False, 0
        self.alive = self.run = self

    def remote(self, *_: Any) -> tuple[int, int]:
        self.calls += 1
        return self.number, self.calls


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ActorPool, list[Fake], list[float]]]:
    fakes, now = [Fake(0), Fake(1)], [0.0]

    def wait(calls, timeout, num_returns=1):
        return [c for c in calls if not fakes[c[0]].gone], []

    def kill(actor):
        actor.killed = True

    found = ActorPool.__new__(ActorPool)
    found.actors, found.under_way, found.away = dict(enumerate(fakes)), {}, {}
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda call: None)
    monkeypatch.setattr(ray, "kill", kill)
    monkeypatch.setattr(pool, "_is_alive", lambda actor: not actor.gone)
    monkeypatch.setattr(pool.time, "monotonic", lambda: now[0])
    yield found, fakes, now


def test_an_actor_whose_node_is_lost_gets_no_task_and_is_given_up_in_time(made):
    """Its tasks would wait for a place that no node has, and the run would never end."""
    found, fakes, now = made
    first = found.remote()
    fakes[0].gone = True
    found.lost(first)
    assert found.ready and {found.remote()[0] for _ in range(4)} == {1}
    now[0] = pool.PLACE_S + 1
    assert found.ready and fakes[0].killed and list(found.actors) == [1]


def test_the_last_actor_that_has_no_place_is_one_error_in_time(made):
    found, fakes, now = made
    for reference in (found.remote(), found.remote()):
        fakes[reference[0]].gone = True
        found.lost(reference)
    assert not found.ready, "no task is given to actors that are away"
    now[0] = pool.PLACE_S + 1
    with pytest.raises(HeliostatError, match=r"can't restart the last actor within 120 s.* run the command again"):
        found.ready  # noqa: B018


def test_an_actor_that_comes_back_takes_tasks_again(made, monkeypatch):
    """Calls to an actor that restarts may fail meanwhile. A busy actor isn't removed."""
    found, fakes, now = made
    reference = found.remote()
    found.lost(reference)

    def unavailable(call):
        raise ActorUnavailableError("restarting", None)

    with monkeypatch.context() as patch:
        patch.setattr(ray, "get", unavailable)
        assert found.ready and list(found.away) == [0]
    fakes[0].gone = True
    monkeypatch.setattr(pool, "_is_alive", lambda actor: True)
    now[0] = pool.PLACE_S + 1
    assert found.ready and not fakes[0].killed and found.away[0].since == now[0]
    fakes[0].gone = False
    assert found.ready and not found.away and {found.remote()[0] for _ in range(2)} == {0, 1}
