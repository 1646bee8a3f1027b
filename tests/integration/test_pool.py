"""The pool of workers on a real Ray: who lives on when their number changes, and what the pool holds meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import ray
from heliostat.config.spec import Workers
from heliostat.errors import PlacementError
from heliostat.training.driver import slots
from heliostat.training.driver.pool import WorkerPool
from ray.util.placement_group import placement_group, remove_placement_group

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(Workers(count=3)) as made:
        yield made


def pids(pool: WorkerPool, count: int) -> set[int]:
    return {member.pid for member in pool.take(count)}


def free(cpus: float, seconds: float = 5) -> bool:
    """Whether so many CPUs become free; Ray tells of it with a delay."""
    deadline = time.monotonic() + seconds
    while (found := ray.available_resources().get("CPU", 0.0)) != cpus and time.monotonic() < deadline:
        time.sleep(0.05)
    return found == cpus


def test_survivors_stay_when_their_number_changes_and_the_rest_is_given_back(pool):
    total = ray.cluster_resources()["CPU"]
    three = pids(pool, 3)
    two = pids(pool, 2)
    assert len(two) == 2 and two < three
    assert free(total - 2), "the third one's resources are still held"
    again = pids(pool, 3)
    assert len(again) == 3 and two < again
    os.kill(min(again), signal.SIGKILL)
    replaced = pids(pool, 3)
    assert len(replaced) == 3 and again - {min(again)} < replaced
    assert free(total - 3)
    pool.close()
    assert free(total)


def test_workers_that_wait_for_the_rest_hold_nothing_after_a_while(pool, monkeypatch, caplog):
    """Three are wanted, there is room for two: first their resources, then the survivors', are others' to take."""
    monkeypatch.setattr(slots, "PLACE_S", 1.0)
    total = int(ray.cluster_resources()["CPU"])
    two = pids(pool, 2)
    others = placement_group([{"CPU": 1}] * (total - 2))
    ray.get(others.ready())
    with pytest.raises(PlacementError, match="there is room for 2 of 3 workers"):
        pool.take(3, patient=False)
    assert free(2)
    pids(pool, 2)
    found: list[set[int]] = []
    waits = threading.Thread(target=lambda: found.append(pids(pool, 3)))
    waits.start()
    assert free(2, 10), "those that wait hold their resources for ever"
    assert pool.waiting and not found
    remove_placement_group(others)
    waits.join(30)
    assert found and len(found[0]) == 3 and not found[0] & two
    assert "what they hold is given back until there is room for all" in caplog.text


def test_two_runs_that_do_not_both_fit_get_on_one_after_the_other(monkeypatch):
    total = int(ray.cluster_resources()["CPU"])
    each = total // 2 + 1
    done: list[int] = []

    def use() -> None:
        with WorkerPool(Workers(count=each)) as made:
            done.append(len(made.take(each)))

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == [each, each]


def test_a_node_that_is_avoided_takes_no_workers(pool):
    pool.take(1)
    (node,) = pool.held()
    pool.avoid([node])
    assert not pool.held()
    with pytest.raises(PlacementError):
        threading.Timer(1.5, pool.close).start()
        pool.take(1)
